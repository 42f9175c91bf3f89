"""Stages against a plain recomputation: ordinary forward passes of whole models with hooks, nothing of ours but the
solver and the packed layer."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.block_stage import BlockStage
from lit_binq.blocks import find_blocks, norm_parameters
from lit_binq.errors import LitBinqError
from lit_binq.formats import BinaryLinear, LatentBinaryLinear, RowColumn
from lit_binq.hub import round_rest
from lit_binq.model_stage import ModelStage
from lit_binq.solvers.row_column import RowColumnSolver
from lit_binq.stages import ClosedForm, Stage, Tuning, end_stage_tuning
from lit_binq.streams import StreamOptions
from lit_binq.workspace import Workspace, round_parameters

CPU = torch.device("cpu")
TRAIN, HELD_OUT, TOKENS = 6, 2, 12

GROUPS = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
}


def make_windows(n: int = TRAIN + HELD_OUT, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (n, TOKENS), generator=torch.Generator().manual_seed(seed))


def workspace(
    teacher: PreTrainedModel, windows: Tensor | None = None, rest_dtype: torch.dtype = torch.float16
) -> Workspace:
    windows = make_windows() if windows is None else windows
    return Workspace(teacher, windows, HELD_OUT, CPU, StreamOptions(), rest_dtype)


def quantize(work: Workspace, form: ClosedForm | None = None, tuning: Tuning | None = None) -> PreTrainedModel:
    """Every block stage, without tuning steps."""
    for i in range(len(work.blocks)):
        stage = BlockStage(work, i, form or ClosedForm(), tuning or Tuning())
        stage.enter()
        stage.leave()
    return work.student


def step(stage: Stage, steps: int = 3) -> None:
    """A few optimizer steps, as a trainer would take them."""
    optimizer = torch.optim.AdamW(stage.parameter_groups(), weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.loss(torch.arange(TRAIN)).backward()
        optimizer.step()


def packed(model: nn.Module) -> dict[str, BinaryLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryLinear)}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in mine.items())


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

    def solve(self, T: Tensor, H: Tensor, *, bits: float | None = None) -> RowColumn:
        self.seen.append((T, H, super().solve(T, H)))
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
        layer = BinaryLinear.from_solution(RowColumnSolver().solve(T, H), original.bias)
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


def differing_codes(a: dict[str, BinaryLinear], b: dict[str, BinaryLinear]) -> float:
    """Share of signs in which two sets of packed layers differ."""
    assert a.keys() == b.keys()
    signs = [torch.cat([layers[n].solution().B.flatten() for n in a]) for layers in (a, b)]
    return float((signs[0] != signs[1]).double().mean())


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


@pytest.mark.parametrize("loss", ["token", "block"])
def test_held_out_windows_are_what_is_evaluated(loss: Any) -> None:
    work = workspace(tiny_model("llama"))
    stage = BlockStage(work, 0, ClosedForm(), Tuning(loss=loss))
    stage.enter()
    s = work.streams
    with torch.no_grad():
        y_hat = stage.module(s.x_tilde, *work.calls[0].args, **work.calls[0].kwargs)
        y_hat = y_hat[0] if isinstance(y_hat, tuple) else y_hat
    for held_out, rows in ((True, slice(TRAIN, None)), (False, slice(0, TRAIN))):
        error, norm = (t[rows].square().double() for t in (y_hat - s.y, s.y))
        if loss == "token":
            expected = [float((error.sum(-1) / norm.sum(-1)).sum()), norm[..., 0].numel()]
        else:
            expected = [float(error.sum()), float(norm.sum())]
        assert stage.evaluate(held_out=held_out).tolist() == pytest.approx(expected, rel=1e-5)
    rows = torch.tensor([4, 1])
    error, norm = (t[rows].square().double() for t in (y_hat - s.y, s.y))
    by_hand = (error.sum(-1) / norm.sum(-1)).mean() if loss == "token" else error.mean() / s.y[:TRAIN].square().mean()
    assert float(stage.loss(rows).detach()) == pytest.approx(float(by_hand), rel=1e-4)


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
        stage = BlockStage(work, i, ClosedForm(), Tuning(epochs=1, lr_scales=0.1, lr_norms=0.1))
        stage.enter()
        step(stage)
        stage.leave()
    model_stage = ModelStage(work, Tuning(epochs=1, lr_scales=0.1, lr_norms=0.1))
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
    work = workspace(teacher, rest_dtype=torch.bfloat16)
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
    round_rest(student, torch.float16)
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
        BlockStage(work, 0, ClosedForm(clip_tokens=clip_tokens, solver=recorder), Tuning()).enter()
        first.append(recorder.seen[0])
    assert relative(first[0][0], first[1][0]) < 1e-4
    assert relative(first[0][1], first[1][1]) < 1e-5


# ---- tuning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["token", "block"])
def test_block_tuning_lowers_the_loss_and_is_kept(loss: Any) -> None:
    work = workspace(tiny_model("llama"))
    stage = BlockStage(work, 0, ClosedForm(), Tuning(epochs=1, lr_codes=0.02, loss=loss))
    stage.enter()
    before = torch.div(*stage.evaluate(held_out=False))
    step(stage, 60)
    tuned = torch.div(*stage.evaluate(held_out=False))
    assert tuned < 0.95 * before
    stage.leave()
    kept = float((work.streams.x_tilde - work.streams.x)[:TRAIN].square().sum())
    error, norm = (t[:TRAIN].square().double().sum(-1) for t in (work.streams.x_tilde - work.streams.x, work.streams.x))
    stored = (error / norm).mean() if loss == "token" else kept / norm.sum()
    assert float(stored) == pytest.approx(float(tuned), rel=0.02)  # float16 scales


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        (Tuning(epochs=1), {"v", "r", "c", "norm"}),
        (Tuning(epochs=1, lr_codes=0), {"r", "c", "norm"}),
        (Tuning(epochs=1, lr_codes=0, lr_norms=0), {"r", "c"}),
        (Tuning(epochs=1, lr_codes=0, lr_scales=0), {"norm"}),
    ],
)
def test_parameter_groups_hold_what_has_a_learning_rate(tuning: Tuning, trained: set[str]) -> None:
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
    stage = ModelStage(work, end_stage_tuning())
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
    stage = ModelStage(work, end_stage_tuning())
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
    stage = ModelStage(work, Tuning())
    stage.enter()
    stage.leave()
    assert same_weights(student, before)


def test_model_stage_moves_codes_only_if_asked_to() -> None:
    for lr_codes, moves in ((0.0, False), (0.5, True)):
        work = workspace(tiny_model("llama"))
        student = quantize(work)
        before = packed(copy.deepcopy(student))
        stage = ModelStage(work, Tuning(epochs=1, lr_codes=lr_codes))
        stage.enter()
        step(stage)
        stage.leave()
        assert (differing_codes(before, packed(student)) > 0) == moves


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epochs", "lr_codes", "lr_scales", "lr_norms", "patience", "final_lr"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_bad_tuning_is_refused(name: str, value: float) -> None:
    with pytest.raises(LitBinqError, match=rf"tuning\.{name}: got {value}"):
        Tuning(**{name: value})


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(LitBinqError, match=r"tuning\.loss: got 'layer', expected one of token, block"):
        Tuning(loss="layer")  # type: ignore[arg-type]  # the point of the test


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
        BlockStage(work, 0, ClosedForm(), Tuning()).enter()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["norm", "bias"])
def test_what_does_not_fit_the_stored_dtype_is_refused(which: str) -> None:
    work = workspace(tiny_model("opt"))
    block = quantize(work).model.decoder.layers[0]
    with torch.no_grad():
        (block.final_layer_norm.weight if which == "norm" else block.fc1.bias)[3] = 1e6
    name = "final_layer_norm.weight" if which == "norm" else "fc1.bias"
    with pytest.raises(LitBinqError, match=rf"{name} has values up to 1e\+06, more than torch\.float16 holds"):
        round_parameters(block, torch.float16)
    round_parameters(block, torch.bfloat16)
