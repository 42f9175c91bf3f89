"""Stages that tune: blocks, the whole model, and what they refuse."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.model_stage import ModelStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentBinaryLinear
from lit_binq.formats.unquantized import round_unquantized
from lit_binq.models.blocks import norm_parameters
from staging import TOKENS, TRAIN, differing_codes, make_windows, packed, quantize, same_weights, step, workspace

# ---- tuning --------------------------------------------------------------------------------------------------------


def test_block_tuning_lowers_the_loss_and_is_kept() -> None:
    work = workspace(tiny_model("llama"))
    stage = BlockStage(work, 0, ClosedForm(), BlockTuning(epochs=1, lr_codes=0.02))
    stage.enter()
    before = torch.div(*stage.evaluate(held_out=False))
    step(stage, 60)
    tuned = torch.div(*stage.evaluate(held_out=False))
    assert tuned < 0.95 * before
    stage.leave()
    error, norm = (t[:TRAIN].square().double().sum(-1) for t in (work.streams.x_tilde - work.streams.x, work.streams.x))
    assert float((error / norm).mean()) == pytest.approx(float(tuned), rel=0.02)  # float16 scales


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        (BlockTuning(epochs=1), {"v", "r", "c", "norm"}),
        (BlockTuning(epochs=1, lr_codes=0), {"r", "c", "norm"}),
        (BlockTuning(epochs=1, lr_codes=0, lr_norms=0), {"r", "c"}),
        (BlockTuning(epochs=1, lr_codes=0, lr_scales=0), {"norm"}),
    ],
)
def test_parameter_groups_hold_what_has_a_learning_rate(tuning: BlockTuning, trained: set[str]) -> None:
    stage = BlockStage(workspace(tiny_model("opt")), 0, ClosedForm(), tuning)
    stage.enter()
    groups = {id(p): g["lr"] for g in stage.parameter_groups() for p in g["params"]}
    found = set()
    for name, p in stage.module.named_parameters():
        kind = "norm" if "norm" in name else name.rpartition(".")[2]
        assert p.requires_grad == (id(p) in groups), name
        if p.requires_grad:
            found.add(kind)
            share = {"v": tuning.lr_codes, "norm": tuning.lr_norms}.get(kind, tuning.lr_scales)
            size = {"v": 1.0, "norm": max(float(p.detach().abs().mean()), 1e-2)}.get(
                kind, float(p.detach().abs().mean())
            )
            assert abs(math.log2(groups[id(p)] / (share * size))) <= 1 / 8 + 1e-6, name  # steps of a quarter octave
    assert found == trained


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_model_stage_loss_is_the_kl_by_hand(kind: str) -> None:
    work = workspace(tiny_model(kind))
    quantize(work)
    stage = ModelStage(work, ModelTuning())
    stage.enter()
    windows = make_windows()

    def by_hand(rows: list[int]) -> float:
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(input_ids=windows[rows], use_cache=False).logits.double(), -1)
                for m in (work.teacher, work.student)
            )
        total = 0.0
        for b in range(len(rows)):
            for t in range(TOKENS):
                total += float((p[b, t].exp() * (p[b, t] - q[b, t])).sum())
        return total / (len(rows) * TOKENS)

    assert float(stage.loss(torch.tensor([3, 1])).detach()) == pytest.approx(by_hand([3, 1]), rel=1e-4)
    assert by_hand([3, 1]) > 1e-3
    for held_out, rows in ((True, [TRAIN, TRAIN + 1]), (False, list(range(TRAIN)))):
        expected = [sum(by_hand([i]) for i in rows), len(rows)]
        assert stage.evaluate(held_out=held_out).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_model_stage_packs_again_and_rounds_norms(kind: str) -> None:
    work = workspace(tiny_model(kind))
    student = quantize(work)
    codes = {name: m.codes.clone() for name, m in packed(student).items()}
    before = student(input_ids=make_windows(), use_cache=False).logits.detach()
    stage = ModelStage(work, ModelTuning())
    stage.enter()
    assert not packed(student)
    torch.testing.assert_close(student(input_ids=make_windows(), use_cache=False).logits.detach(), before)
    step(stage)
    stage.leave()
    assert student is work.student
    assert {name: m.codes.tolist() for name, m in packed(student).items()} == {n: c.tolist() for n, c in codes.items()}
    assert not any(isinstance(m, LatentBinaryLinear) for m in student.modules())
    for name, p in norm_parameters(student).items():
        assert torch.equal(p, p.half().float()), name
    after = student(input_ids=make_windows(), use_cache=False).logits
    assert not torch.allclose(after, before, atol=1e-4)
    assert not after.requires_grad


def test_model_stage_without_steps_changes_nothing() -> None:
    work = workspace(tiny_model("qwen2"))
    student = quantize(work)
    before = copy.deepcopy(student)
    stage = ModelStage(work, ModelTuning())
    stage.enter()
    stage.leave()
    assert same_weights(student, before)


def test_model_stage_moves_codes_only_if_asked_to() -> None:
    for lr_codes, moves in ((0.0, False), (0.5, True)):
        work = workspace(tiny_model("llama"))
        student = quantize(work)
        before = packed(copy.deepcopy(student))
        stage = ModelStage(work, ModelTuning(epochs=1, lr_codes=lr_codes))
        stage.enter()
        step(stage)
        stage.leave()
        assert (differing_codes(before, packed(student)) > 0) == moves


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epochs", "lr_codes", "lr_scales", "lr_norms"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_bad_tuning_is_refused(name: str, value: float) -> None:
    with pytest.raises(LitBinqError, match=rf"tuning\.{name}: got {value}"):
        BlockTuning(**{name: value})


def spoil(make: Callable[[nn.Module], Tensor]) -> Callable[[Workspace], None]:
    def apply(work: Workspace) -> None:
        with torch.no_grad():
            make(work.teacher_blocks[0]).fill_(math.nan)

    return apply


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (spoil(lambda b: b.mlp.up_proj.weight), r"block 0, mlp\.up_proj: solver: target or metric holds NaN"),
        (spoil(lambda b: b.input_layernorm.weight), r"block 0, self_attn\.q_proj: statistics: activations hold NaN"),
    ],
)
def test_errors_name_the_block_and_the_layer(spoiled: Callable[[Workspace], None], message: str) -> None:
    work = workspace(tiny_model("llama"))
    spoiled(work)
    with pytest.raises(LitBinqError, match=message) as caught:
        BlockStage(work, 0, ClosedForm(), BlockTuning()).enter()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["norm", "bias"])
def test_what_does_not_fit_the_stored_dtype_is_refused(which: str) -> None:
    work = workspace(tiny_model("opt"))
    block = quantize(work).model.decoder.layers[0]
    with torch.no_grad():
        (block.final_layer_norm.weight if which == "norm" else block.fc1.bias)[3] = 1e6
    name = "final_layer_norm.weight" if which == "norm" else "fc1.bias"
    with pytest.raises(LitBinqError, match=rf"{name} has values up to 1e\+06 that float16 cannot hold"):
        round_unquantized(block, torch.float16)
    round_unquantized(block, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, r"end_to_end\.epochs: got -1"),
        ({"lr_norms": math.nan}, r"end_to_end\.lr_norms: got nan"),
        (
            {"epochs": 1, "lr_codes": 0, "lr_scales": 0, "lr_norms": 0},
            r"end_to_end: got epochs with every learning rate 0",
        ),
        ({"lr_scales": math.inf}, r"end_to_end\.lr_scales: got inf"),
    ],
)
def test_errors_of_the_model_stage_name_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LitBinqError, match=message):
        ModelTuning(**options)
    with pytest.raises(LitBinqError, match=message.replace("end_to_end", "tuning")):
        BlockTuning(**options)


def test_an_option_that_means_nothing_in_a_stage_does_not_exist() -> None:
    assert not hasattr(BlockTuning(), "lr_embeddings")
    assert not hasattr(ModelTuning(), "interaction")
