"""Stages against a plain recomputation: ordinary forward passes of whole models with hooks, nothing of ours but the
solver and the packed layer."""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.calibration import block_stage
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.model_stage import ModelStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.formats import BinaryLinear, LatentBinaryLinear, RowColumn
from lit_binq.hub.save_load import round_unquantized
from lit_binq.models.blocks import find_blocks, norm_parameters
from lit_binq.solvers import Problem
from lit_binq.solvers.row_column import RowColumnSolver
from staging import (
    CPU,
    HELD_OUT,
    TOKENS,
    TRAIN,
    differing_codes,
    make_windows,
    packed,
    quantize,
    same_weights,
    step,
    workspace,
)

GROUPS = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
}


# ---- the closed form, recomputed -----------------------------------------------------------------------------------


def layer_input(model: PreTrainedModel, layer: nn.Module, windows: Tensor) -> Tensor:
    """(tokens, K) float64: what `layer` gets when the whole model runs."""
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(input_ids=windows, use_cache=False)
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def plain_target(W: Tensor, x: Tensor, x_tilde: Tensor, form: ClosedForm) -> tuple[Tensor, Tensor]:
    """T and H in float64, from the definitions."""
    W, identity = W.double(), torch.eye(W.shape[1], dtype=torch.float64)
    if form.objective == "weight":
        return W, identity
    weights = torch.ones(len(x), dtype=torch.float64)
    if form.clip_tokens:
        for window in range(len(x) // TOKENS):
            part = slice(window * TOKENS, (window + 1) * TOKENS)
            power = x[part].square().sum(1)
            median = power.sort().values[(TOKENS - 1) // 2]
            weights[part] = torch.where(power > median, median / power, 1.0)
    left = {"naive_output": x, "pseudo_target": x_tilde, "true_target": x_tilde}[form.objective]
    H = torch.einsum("t,tj,tk->jk", weights, left, left) / len(x)
    ridge = form.shrinkage * H.diagonal().mean() * identity
    if form.objective != "true_target":
        return W, H + ridge
    C = torch.einsum("t,tj,tk->jk", weights, x, x_tilde) / len(x)
    return W @ (C + ridge) @ torch.linalg.inv(H + ridge), H + ridge


@dataclass
class Recorder(RowColumnSolver):
    """The solver, and what it was asked and answered."""

    seen: list[tuple[Tensor, Tensor, RowColumn]] = field(default_factory=list)

    def solve(self, problem: Problem) -> RowColumn:
        self.seen.append((problem.T, problem.H, super().solve(problem)))
        return self.seen[-1][2]


def prefix(model: PreTrainedModel) -> str:
    return "model.decoder.layers" if model.config.model_type == "opt" else "model.layers"


@torch.no_grad()
def recompute(
    teacher: PreTrainedModel,
    form: ClosedForm,
    solutions: dict[str, RowColumn],
    *,
    quantized_groups_in_place: bool = True,
) -> dict[str, tuple[Tensor, Tensor]]:
    """T and H of every layer by name.

    The stages' own `solutions` go into the student, group by group: a code that hangs on a rounding would otherwise
    give the layers behind it other inputs.
    With `quantized_groups_in_place` False every group of a block sees the full-precision groups before it.
    """
    student, windows = copy.deepcopy(teacher), make_windows()[:TRAIN]
    embeddings = [m.weight for m in student.modules() if isinstance(m, nn.Embedding)]
    for p in (*embeddings, *(p for p in student.parameters() if p.dim() == 1)):
        p.copy_(p.half().float())
    # A block's own norms and biases are rounded when the block is packed, not before.
    for block, original in zip(find_blocks(student), find_blocks(teacher), strict=True):
        block.load_state_dict(original.state_dict())
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for i, block in enumerate(find_blocks(student)):
        for names in GROUPS[student.config.model_type]:
            full = [f"{prefix(student)}.{i}.{name}" for name in names]
            x, x_tilde = (layer_input(m, m.get_submodule(full[0]), windows) for m in (teacher, student))
            for name in full:
                linear = student.get_submodule(name)
                result[name] = plain_target(linear.weight, x, x_tilde, form)
                if quantized_groups_in_place:
                    linear.weight.copy_(BinaryLinear.from_solution(solutions[name]).dequantize())
        for name in itertools.chain(*GROUPS[student.config.model_type]):
            solution = solutions[f"{prefix(student)}.{i}.{name}"]
            block.get_submodule(name).weight.copy_(BinaryLinear.from_solution(solution).dequantize())
        for p in block.parameters():
            if p.dim() == 1:
                p.copy_(p.half().float())
    return result


def run_recorded(
    teacher: PreTrainedModel, **options: Any
) -> tuple[ClosedForm, PreTrainedModel, dict[str, tuple[Tensor, Tensor, RowColumn]]]:
    """Every block stage; the student, and (T, H, solution) of every layer by name."""
    recorder = Recorder()
    form = ClosedForm(solver=recorder, **options)
    student = quantize(workspace(teacher), form)
    groups = GROUPS[teacher.config.model_type]
    names = [f"{prefix(teacher)}.{i}.{name}" for i in range(2) for name in itertools.chain(*groups)]
    return form, student, dict(zip(names, recorder.seen, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("clip_tokens", [True, False])
@pytest.mark.parametrize("objective", ["weight", "naive_output", "pseudo_target", "true_target"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_block_stages_equal_a_plain_recomputation(kind: str, objective: Any, clip_tokens: bool) -> None:
    teacher = tiny_model(kind)
    form, student, seen = run_recorded(teacher, objective=objective, clip_tokens=clip_tokens)
    expected = recompute(teacher, form, {name: s for name, (_, _, s) in seen.items()})
    found = packed(student)
    assert found.keys() == seen.keys()
    for name, (T, H, solution) in seen.items():
        assert relative(T, expected[name][0]) < 1e-4, name
        assert relative(H, expected[name][1]) < 1e-5, name
        original = teacher.get_submodule(name)
        layer = BinaryLinear.from_solution(RowColumnSolver().solve(Problem(T, H)), original.bias)
        assert torch.equal(found[name].codes, layer.codes)
        assert torch.equal(found[name].dequantize(), layer.dequantize())
        assert torch.equal(layer.dequantize(), BinaryLinear.from_solution(solution).dequantize())
        if original.bias is not None:
            assert torch.equal(found[name].bias, original.bias.half().float())
    for name, p in norm_parameters(student).items():
        assert torch.equal(p, teacher.get_parameter(name).half().float()), name


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_later_groups_see_the_quantized_groups_before_them(kind: str) -> None:
    """The same recomputation with full-precision groups in place agrees on a block's first group only."""
    teacher = tiny_model(kind)
    form, _, seen = run_recorded(teacher)
    solutions = {name: s for name, (_, _, s) in seen.items()}
    blind = recompute(teacher, form, solutions, quantized_groups_in_place=False)
    for name, (T, H, _) in seen.items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            assert relative(T, blind[name][0]) < 1e-4, name
        else:
            assert relative(T, blind[name][0]) > 1e-2, name
            assert relative(H, blind[name][1]) > 1e-2, name


def test_objectives_and_options_lead_to_different_codes() -> None:
    """Otherwise the recomputation above would show less than it seems to."""
    teacher = tiny_model("llama")
    forms = [ClosedForm(objective=o) for o in ("weight", "naive_output", "pseudo_target", "true_target")]
    forms += [ClosedForm(clip_tokens=False), ClosedForm(shrinkage=1.0), ClosedForm(solver=RowColumnSolver(rounds=1))]
    results = [packed(quantize(workspace(teacher), form)) for form in forms]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert differing_codes(a, b) > 1e-3


def test_the_true_target_ends_closest_to_the_teacher() -> None:
    """What output alignment is for: of all objectives the least error of the last block's output."""
    teacher, errors = tiny_model("llama"), {}
    windows = make_windows(40)
    for objective in ("weight", "pseudo_target", "true_target"):
        work = workspace(teacher, windows)
        quantize(work, ClosedForm(objective=objective))
        errors[objective] = float((work.streams.x_tilde - work.streams.x).norm())
    assert errors["true_target"] < min(errors["weight"], errors["pseudo_target"])


# ---- what goes into the statistics ---------------------------------------------------------------------------------


def test_held_out_windows_are_never_used() -> None:
    one, other = make_windows(), make_windows()
    other[TRAIN:] = make_windows(seed=1)[TRAIN:]
    third = make_windows()
    third[TRAIN - 1] = make_windows(seed=1)[0]
    a, b, c = (quantize(workspace(tiny_model("llama"), w)) for w in (one, other, third))
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_held_out_windows_are_what_is_evaluated() -> None:
    work = workspace(tiny_model("llama"))
    stage = BlockStage(work, 0, ClosedForm(), BlockTuning())
    stage.enter()
    s = work.streams
    with torch.no_grad():
        y_hat = stage.module(s.x_tilde, *work.calls[0].args, **work.calls[0].kwargs)
        y_hat = y_hat[0] if isinstance(y_hat, tuple) else y_hat
    for held_out, rows in ((True, slice(TRAIN, None)), (False, slice(0, TRAIN))):
        error, norm = (t[rows].square().double() for t in (y_hat - s.y, s.y))
        expected = [float((error.sum(-1) / norm.sum(-1)).sum()), norm[..., 0].numel()]
        assert stage.evaluate(held_out=held_out).tolist() == pytest.approx(expected, rel=1e-4)  # norms are rounded


# ---- the workspace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
def test_the_teacher_is_left_alone(kind: str) -> None:
    """Bit for bit, through every kind of stage with tuning steps of everything that can be tuned."""
    teacher = tiny_model(kind)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    ids = {name: id(p) for name, p in teacher.named_parameters()}
    logits = teacher(input_ids=make_windows(), use_cache=False).logits
    work = workspace(teacher)
    for i in range(2):
        stage = BlockStage(work, i, ClosedForm(), BlockTuning(epochs=1, lr_scales=0.1, lr_norms=0.1))
        stage.enter()
        step(stage)
        stage.leave()
    model_stage = ModelStage(work, ModelTuning(epochs=1, lr_scales=0.1, lr_norms=0.1))
    model_stage.enter()
    step(model_stage)
    model_stage.leave()
    after = teacher.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert ids == {name: id(p) for name, p in teacher.named_parameters()}
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(teacher(input_ids=make_windows(), use_cache=False).logits, logits.detach())
    assert not any(isinstance(m, (BinaryLinear, LatentBinaryLinear)) for m in teacher.modules())


def test_the_student_starts_as_the_rounded_teacher_and_stays_tied() -> None:
    teacher = tiny_model("llama")
    work = workspace(teacher, unquantized_dtype=torch.bfloat16)
    embedding = teacher.get_input_embeddings().weight
    assert torch.equal(work.student.get_input_embeddings().weight, embedding.bfloat16().float())
    assert work.student.lm_head.weight is work.student.get_input_embeddings().weight
    assert torch.equal(work.student.model.norm.weight, teacher.model.norm.weight.bfloat16().float())
    assert work.blocks[0].mlp.up_proj.weight is work.teacher_blocks[0].mlp.up_proj.weight  # until it is replaced
    assert not torch.equal(work.streams.x, work.streams.x_tilde)


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
def test_streams_advance_with_exactly_what_is_stored(kind: str) -> None:
    """Nothing of a packed block changes any more when the model is written: norms and biases are rounded by then."""
    work = workspace(tiny_model(kind))
    student = quantize(work)
    states = {name: t.clone() for name, t in student.state_dict().items()}
    last: list[Tensor] = []
    work.blocks[-1].register_forward_hook(lambda _, args, out: last.append(out))
    with torch.no_grad():
        student(input_ids=make_windows(), use_cache=False)
    torch.testing.assert_close(work.streams.x_tilde, last[0], rtol=1e-6, atol=1e-6)
    round_unquantized(student, torch.float16)
    assert all(torch.equal(t, states[name]) for name, t in student.state_dict().items())
    assert not any(p.requires_grad for p in student.parameters())


def test_skipping_a_packed_block_is_as_good_as_its_stage() -> None:
    done, again = workspace(tiny_model("opt")), workspace(tiny_model("opt"))
    quantize(done)
    for i in range(2):
        again.blocks[i] = copy.deepcopy(done.blocks[i])
        again.skip(i)
    assert torch.equal(done.streams.x, again.streams.x)
    assert torch.equal(done.streams.x_tilde, again.streams.x_tilde)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("clip_tokens", [True, False])
def test_batches_of_the_statistics_do_not_matter(kind: str, clip_tokens: bool) -> None:
    first: list[tuple[Tensor, Tensor, RowColumn]] = []
    for batch in (8, 1):
        options, recorder = StreamOptions(batch_windows=batch), Recorder()
        work = Workspace(tiny_model(kind), make_windows(), HELD_OUT, CPU, options, torch.float16)
        BlockStage(work, 0, ClosedForm(clip_tokens=clip_tokens, solver=recorder), BlockTuning()).enter()
        first.append(recorder.seen[0])
    assert relative(first[0][0], first[1][0]) < 1e-4
    assert relative(first[0][1], first[1][1]) < 1e-5


@pytest.mark.parametrize("objective", ["naive_output", "pseudo_target", "true_target"])
def test_the_teacher_s_inputs_may_be_kept_or_computed_again(objective, monkeypatch):
    """Bit for bit the same block, and one pass of the teacher's block for all groups where they are kept."""
    blocks, passes = [], []
    for limit in (block_stage.TEACHER_BYTES, 0):
        monkeypatch.setattr(block_stage, "TEACHER_BYTES", limit)
        stage = BlockStage(workspace(tiny_model("llama")), 0, ClosedForm(objective=objective), BlockTuning(epochs=0))
        called = []
        handle = stage.work.teacher_blocks[0].self_attn.q_proj.register_forward_pre_hook(
            lambda *_, seen=called: seen.append(1)
        )
        stage.enter()
        handle.remove()
        blocks.append(stage.module.state_dict())
        passes.append(len(called))
    assert all(torch.equal(blocks[0][name], t) for name, t in blocks[1].items())
    assert passes[0] < passes[1]
