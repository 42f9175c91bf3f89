"""Diagnostics against plain re-computations in float64."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from block_cases import LENGTH, WINDOWS, Case, inputs_of, make_case, sign_weight
from lit_binq.diagnostics.measure import DiagnosticsOptions, block_losses, measure_block
from lit_binq.diagnostics.probe import probe
from lit_binq.errors import LitBinqError
from lit_binq.models.blocks import BlockCall, replace_module, run_block
from lit_binq.utils.json_records import DIAGNOSTICS, BlockMeasures, read_diagnostics, write_diagnostics


@pytest.fixture
def case(any_model: PreTrainedModel) -> Case:
    return make_case(any_model)


def test_linear_measures_are_their_definitions(case: Case) -> None:
    record = case.measure()
    assert list(record.linears) == case.names
    for name in case.names:
        W = case.reference.get_submodule(name).weight.double()
        W_hat = case.module.get_submodule(name).dequantize().double()
        x = inputs_of(case.reference, name, case.x, case.call)
        x_tilde = inputs_of(case.module, name, case.x_tilde, case.call)
        true, pseudo, got = x @ W.T, x_tilde @ W.T, x_tilde @ W_hat.T
        grams = [o / o.norm(dim=-1, keepdim=True) for o in (true, pseudo, got)]
        G, G_pseudo, G_hat = (o @ o.mT for o in grams)
        summed = {"activation": (G_hat - G_pseudo).norm(dim=(1, 2)).sum(), "output": (G_hat - G).norm(dim=(1, 2)).sum()}
        expected = {
            "weight_error": (W - W_hat).norm(),
            "weight_error_relative": (W - W_hat).norm() / W.norm(),
            "activation_error": (pseudo - got).norm(),
            "activation_error_relative": (pseudo - got).norm() / pseudo.norm(),
            "output_error": (true - got).norm(),
            "output_error_relative": (true - got).norm() / true.norm(),
            "activation_similarity": torch.cosine_similarity(pseudo, got, dim=-1).mean(),
            "output_similarity": torch.cosine_similarity(true, got, dim=-1).mean(),
            **{f"{k}_token_error": v for k, v in summed.items()},
            **{f"{k}_token_error_mean": v / WINDOWS for k, v in summed.items()},
        }
        measured = dataclasses.asdict(record.linears[name])
        assert measured == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4), name
        assert measured["activation_error"] != pytest.approx(measured["output_error"], rel=1e-3)


def test_block_measures_are_their_definitions(case: Case) -> None:
    before = block_losses(case.reference, case.reference, case.x, case.x_tilde, case.call)
    record = case.measure(index=7, before=before)
    y, y_hat = run_block(case.reference, case.x, case.call), run_block(case.module, case.x_tilde, case.call)
    error, size = (y_hat - y).double().square(), y.double().square()
    assert record.after.block == pytest.approx(float(error.sum() / size.sum()), rel=1e-4)
    assert record.after.token == pytest.approx(float((error.sum(-1) / size.sum(-1)).mean()), rel=1e-4)
    floor = run_block(case.reference, case.x_tilde, case.call) - y
    assert before.block == pytest.approx(float(floor.square().sum() / size.sum()), rel=1e-4)
    assert record.before is before
    assert (record.block, record.windows, record.window_length) == (7, WINDOWS, LENGTH)
    for (plain, directions), out in (
        ((record.ranks.reference, record.ranks.reference_directions), y),
        ((record.ranks.quantized, record.ranks.quantized_directions), y_hat),
    ):
        flat = out.double().flatten(0, 1)
        assert plain == pytest.approx(rank_by_svd(flat), rel=1e-5)
        assert directions == pytest.approx(rank_by_svd(flat / flat.norm(dim=-1, keepdim=True)), rel=1e-5)


def rank_by_svd(Y: Tensor) -> float:
    p = torch.linalg.svdvals(Y.double())
    p = p / p.sum()
    return math.exp(-sum(float(v) * math.log(float(v)) for v in p if v > 0))


def test_a_block_that_is_not_quantized_has_no_errors(case: Case) -> None:
    other = dataclasses.replace(case, module=copy.deepcopy(case.reference), x_tilde=case.x)
    record = other.measure()
    assert record.after.block == record.after.token == 0
    assert record.attention_divergence == pytest.approx(0, abs=1e-6)
    assert record.ranks.reference == record.ranks.quantized
    for m in record.linears.values():
        assert m.weight_error == m.activation_error == m.output_error_relative == m.output_token_error == 0
        assert m.output_similarity == pytest.approx(1, abs=1e-6)
    assert record.notes == []


def test_measuring_leaves_blocks_and_configurations_alone(case: Case) -> None:
    before = [run_block(b, case.x, case.call) for b in (case.reference, case.module)]
    state = copy.deepcopy(case.module.state_dict())
    configs = [m.config for b in (case.reference, case.module) for m in b.modules() if hasattr(m, "config")]
    kinds = [c._attn_implementation for c in configs]
    assert set(kinds) == {"sdpa"}
    case.measure()
    probe(case.reference, case.x, case.x_tilde, case.call, case.names, {"sign": lambda _, m: sign_weight(m).dense()})
    assert [c._attn_implementation for c in configs] == kinds
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in case.module.modules())
    assert all(torch.equal(state[k], v) for k, v in case.module.state_dict().items())
    for b, y in zip((case.reference, case.module), before, strict=True):
        assert torch.equal(run_block(b, case.x, case.call), y)


def test_measures_do_not_depend_on_autocast_or_matmul_precision(llama: PreTrainedModel) -> None:
    case = make_case(llama)
    plain = case.measure()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert case.measure() == plain
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_packed_layers_are_measured(llama: PreTrainedModel) -> None:
    case = make_case(llama)
    packed = case.module.get_submodule(case.names[0])
    replace_module(case.module, case.names[0], packed.latent(True))
    with pytest.raises(ValueError, match="expected a packed one"):
        case.measure()


@pytest.mark.parametrize("shapes", [((2, 5, 32), (1, 5, 32)), ((0, 5, 32), (0, 5, 32)), ((5, 32), (5, 32))])
def test_streams_that_do_not_fit_are_refused(llama: PreTrainedModel, shapes: tuple[tuple[int, ...], ...]) -> None:
    case = make_case(llama)
    case.x, case.x_tilde = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=r"expected \(n, T, d\)"):
        case.measure()
    with pytest.raises(ValueError, match=r"expected \(n, T, d\)"):
        probe(case.reference, case.x, case.x_tilde, case.call, case.names, {"w": lambda _, m: m.weight})


def test_dead_and_massive_activations_give_finite_records(llama: PreTrainedModel) -> None:
    case = make_case(llama)
    case.x, case.x_tilde = torch.zeros_like(case.x), torch.zeros_like(case.x)
    record = case.measure()
    down = record.linears["mlp.down_proj"]
    assert down.output_error_relative == down.output_similarity == down.output_token_error == 0
    assert record.ranks.reference == 0
    case = make_case(llama)
    case.x[0, 0] *= 1e6
    case.x_tilde[0, 0] *= 1e6
    text = json.dumps(dataclasses.asdict(case.measure()), allow_nan=False)
    assert "null" not in text.replace('"probe": null', "").replace('"before": null', "")


def test_what_is_not_finite_is_null(llama: PreTrainedModel) -> None:
    case = make_case(llama)
    case.x_tilde[0, 0, 0] = float("nan")
    record = case.measure(attention=False)
    assert record.after.block is record.linears["mlp.down_proj"].output_error is record.ranks.quantized is None
    assert record.ranks.reference is not None
    json.dumps(dataclasses.asdict(record), allow_nan=False)


class Experts(nn.Module):
    """A block one of whose layers sees only some tokens, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.every, self.some = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.every(x)
        return out + self.some(x[x[..., 0] > 0]).sum(0)


def test_layers_that_miss_tokens_and_blocks_without_attention_are_named() -> None:
    torch.manual_seed(0)
    block = Experts().requires_grad_(False)
    x = torch.randn(2, 9, 4)
    record = measure_block(block, copy.deepcopy(block), x, x, BlockCall(), ["every", "some"])
    assert list(record.linears) == ["every"]
    assert record.attention_divergence is None
    assert len(record.notes) == 2
    assert "some: not measured" in record.notes[0]
    assert "no module of the block returns attention maps" in record.notes[1]


# ---- the probe ------------------------------------------------------------------------------------------------------


def test_probe_quantizes_one_layer_and_nothing_else(case: Case) -> None:
    calls: list[str] = []

    def signs(name: str, linear: nn.Linear) -> Tensor:
        calls.append(name)
        return sign_weight(linear).dense()

    result = probe(
        case.reference, case.x, case.x_tilde, case.call, case.names, {"none": lambda _, m: m.weight, "signs": signs}
    )
    assert calls == case.names
    floor = block_losses(case.reference, case.reference, case.x, case.x_tilde, case.call)
    assert result.floor == floor
    for name in case.names:
        none, got = result.linears[name]["none"], result.linears[name]["signs"]
        assert none.loss == floor
        assert none.activation_error_relative == 0
        block = copy.deepcopy(case.reference)
        linear = block.get_submodule(name)
        W, W_hat = linear.weight.clone().double(), sign_weight(linear).dense()
        linear.weight.copy_(W_hat)
        assert dataclasses.astuple(got.loss) == pytest.approx(
            dataclasses.astuple(block_losses(case.reference, block, case.x, case.x_tilde, case.call)), rel=1e-5
        )
        assert got.loss != floor
        x, x_tilde = (inputs_of(case.reference, name, s, case.call) for s in (case.x, case.x_tilde))
        E = x_tilde @ (W - W_hat.double()).T
        assert got.activation_error_relative == pytest.approx(float(E.norm() / (x_tilde @ W.T).norm()), rel=1e-4)
        E = x @ W.T - x_tilde @ W_hat.double().T
        assert got.output_error_relative == pytest.approx(float(E.norm() / (x @ W.T).norm()), rel=1e-4)


def test_probe_refuses_no_method_and_wrong_shapes(llama: PreTrainedModel) -> None:
    case = make_case(llama)
    arguments = (case.reference, case.x, case.x_tilde, case.call, case.names)
    with pytest.raises(ValueError, match="no methods"):
        probe(*arguments, {})
    with pytest.raises(ValueError, match="'odd' gave"):
        probe(*arguments, {"odd": lambda _, m: m.weight[:1]})


def test_probe_of_a_layer_that_misses_tokens_still_has_a_loss() -> None:
    torch.manual_seed(0)
    block, x = Experts().requires_grad_(False), torch.randn(2, 9, 4)
    result = probe(block, x, x, BlockCall(), ["some"], {"half": lambda _, m: m.weight / 2})
    half = result.linears["some"]["half"]
    assert half.activation_error_relative is None
    assert half.loss.block is not None
    assert half.loss.block > 0 == result.floor.block


# ---- options and the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"), [({"windows": -1}, "diagnostics.windows"), ({"probe": True}, "diagnostics.probe")]
)
def test_options_that_contradict_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(LitBinqError, match=named) as caught:
        DiagnosticsOptions(**options)
    assert "\n" not in str(caught.value)
    assert DiagnosticsOptions(windows=2, probe=True).attention


@pytest.fixture
def record(llama: PreTrainedModel) -> BlockMeasures:
    case = make_case(llama)
    before = block_losses(case.reference, case.module, case.x, case.x_tilde, case.call)
    record = case.measure(before=before)
    record.probe = probe(
        case.reference, case.x, case.x_tilde, case.call, case.names, {"weight": lambda _, m: sign_weight(m).dense()}
    )
    return record


def test_records_survive_the_file(record: BlockMeasures, tmp_path: Path) -> None:
    bare = dataclasses.replace(record, block=1, probe=None, before=None, attention_divergence=None, notes=["why"])
    write_diagnostics(tmp_path / DIAGNOSTICS, [record, bare])
    assert read_diagnostics(tmp_path / DIAGNOSTICS) == [record, bare]


def test_scalars_name_every_figure(record: BlockMeasures) -> None:
    scalars = record.scalars()
    assert scalars["block_0/loss_token_before"] == record.before.token
    assert scalars["block_0/rank_quantized"] == record.ranks.quantized
    mean = sum(m.output_similarity for m in record.linears.values()) / len(record.linears)
    assert scalars["block_0/output_similarity"] == pytest.approx(mean)
    assert len(scalars) == 1 + 4 + 4 + 12
    empty = dataclasses.replace(record, linears={}, before=None, attention_divergence=None)
    assert len(empty.scalars()) == 4 + 2


def leaf(value: Any, path: list[Any]) -> tuple[Any, Any]:
    for key in path[:-1]:
        value = value[key]
    return value, path[-1]


@pytest.mark.parametrize(
    ("path", "new", "said"),
    [
        (["version"], 2, "version 2, expected 1"),
        (["version"], True, "version True"),
        (["blocks"], None, "blocks: got 'None', expected a list"),
        (["blocks", 0, "block"], 1.5, r"blocks\[0\].block: got '1.5', expected a whole number"),
        (["blocks", 0, "after", "token"], "x", r"after.token: got 'x', expected a finite number"),
        (["blocks", 0, "after"], 3, r"after: got '3', expected an object"),
        (["blocks", 0, "notes"], ["a", 1], r"notes\[1\]"),
        (["blocks", 0, "linears", "mlp.up_proj", "weight_error"], True, "up_proj.weight_error"),
        (["blocks", 0, "probe", "floor", "odd"], 1, "unknown key 'odd'"),
        (["blocks", 0, "linears", "mlp.up_proj"], {}, "missing key"),
    ],
)
def test_files_of_another_shape_are_one_line(
    record: BlockMeasures, tmp_path: Path, path: list[Any], new: Any, said: str
) -> None:
    file = tmp_path / DIAGNOSTICS
    write_diagnostics(file, [record])
    value = json.loads(file.read_text())
    where, key = leaf(value, path)
    where[key] = new
    file.write_text(json.dumps(value))
    with pytest.raises(LitBinqError, match=said) as caught:
        read_diagnostics(file)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(text=st.one_of(st.text(max_size=30), st.sampled_from(["[]", "{}", '{"version": 1}', "NaN"])))
def test_damaged_files_are_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("d") / DIAGNOSTICS
    file.write_text(text, encoding="utf-8")
    with pytest.raises(LitBinqError) as caught:
        read_diagnostics(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(LitBinqError, match="cannot be read"):
        read_diagnostics(file.with_name("missing.json"))
