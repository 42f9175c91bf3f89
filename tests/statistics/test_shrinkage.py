"""Shrinkage chosen from data: the error it goes by, token by token; the choice, recomputed from plain activations."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fitting import Remember, assert_same, fit, two_processes
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.stages import ClosedForm, Tuning
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.diagnostics.measure import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.formats.manifest import read_marker
from lit_binq.models.blocks import linear_input
from lit_binq.solvers import GroupedSolver, RowColumnSolver
from lit_binq.statistics.objectives import GramAccumulator, Statistics, target_and_metric
from lit_binq.statistics.shrinkage import GRID, choose_shrinkage, pooled, split, true_target_error
from lit_binq.utils.json_records import read_diagnostics

CPU = torch.device("cpu")
N, K = 5, 7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_streams(tokens: int, seed: int, noise: float = 0.4) -> tuple[Tensor, Tensor]:
    """x with correlated columns (the same way for every seed), x~ that drifted away from it."""
    x = normal(tokens, K, seed=seed) @ normal(K, K, seed=99)
    return x, 0.8 * x + noise * normal(tokens, K, seed=seed + 1000)


def gather(streams: tuple[Tensor, Tensor], weights: Tensor | None = None, *, validating: bool = False) -> Statistics:
    grams = GramAccumulator(K, CPU, "true_target", validating=validating)
    grams.add(*streams, weights)
    return grams.statistics()


def by_tokens(W: Tensor, A: Tensor, streams: tuple[Tensor, Tensor], weights: list[float] | None = None) -> float:
    """Mean over tokens of |W x - A x~|^2."""
    W, A, x, x_tilde = (t.double() for t in (W, A, *streams))
    weights = weights or [1.0] * len(x)
    return sum(w * float((W @ a - A @ b).square().sum()) for w, a, b in zip(weights, x, x_tilde, strict=True)) / len(x)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 30), weighted=st.booleans(), power=st.integers(-4, 4))
def test_the_error_from_grams_is_the_error_of_the_tokens(seed: int, tokens: int, weighted: bool, power: int) -> None:
    x, x_tilde = (10.0**power * t for t in two_streams(tokens, seed))
    W, A = normal(N, K, seed=seed + 1), normal(N, K, seed=seed + 2)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) if weighted else None
    stats = gather((x, x_tilde), weights, validating=True)
    expected = by_tokens(W, A, (x, x_tilde), None if weights is None else weights.tolist())
    assert true_target_error(W, A, stats) == pytest.approx(expected, rel=1e-4)


def test_only_validating_grams_hold_the_full_precision_stream() -> None:
    """What the fit needs is gathered without it: one product of three less."""
    streams = two_streams(20, 0)
    assert not gather(streams).F.any()
    torch.testing.assert_close(gather(streams, validating=True).F, streams[0].T @ streams[0] / 20)


@pytest.mark.parametrize("tokens", [8, 20, 60, 2000])
def test_the_choice_is_the_best_on_other_tokens(tokens: int) -> None:
    """By brute force; layers of one group count alike, however large their outputs."""
    train, other = two_streams(tokens, 0, 1.0), two_streams(500, 1, 1.0)
    weights = {"small": normal(N, K, seed=3), "large": 1000 * normal(2 * N, K, seed=4)}
    fitting = gather(train)

    def candidate(name: str, value: float) -> Tensor:
        return target_and_metric(weights[name], fitting, objective="true_target", shrinkage=value)[0]

    choice = choose_shrinkage(weights, gather(other, validating=True), candidate)
    expected = {}
    for value in GRID:
        ratios = [
            by_tokens(W, candidate(n, value), other) / by_tokens(W, torch.zeros_like(W), other)
            for n, W in weights.items()
        ]
        expected[value] = sum(ratios) / 2
    assert choice.errors == pytest.approx(expected, rel=1e-4)
    assert choice.shrinkage == min(GRID, key=lambda value: expected[value])


def test_few_tokens_ask_for_more_shrinkage_than_many() -> None:
    W = {"w": normal(N, K, seed=3)}
    other = gather(two_streams(500, 1, 1.0), validating=True)
    chosen = []
    for tokens in (9, 20_000):
        fitting = gather(two_streams(tokens, 0, 1.0))
        chosen.append(
            choose_shrinkage(
                W,
                other,
                lambda name, value, stats=fitting: target_and_metric(
                    W[name], stats, objective="true_target", shrinkage=value
                )[0],
            ).shrinkage
        )
    assert chosen[0] >= 0.1 > chosen[1]


def errors_of(values: dict[float, float]) -> Any:
    """A candidate whose relative error on identity Grams is what `values` says: A = (1 - sqrt(error)) W."""
    W = torch.ones(1, 1)
    return {"w": W}, lambda _, value: (1 - torch.tensor(values[value]).sqrt()) * W


def identity_statistics() -> Statistics:
    return Statistics(*(torch.ones(1, 1) for _ in range(3)), 1)


def test_of_equals_the_largest_and_never_one_that_is_not_finite() -> None:
    flat = dict.fromkeys(GRID, 0.25)
    assert choose_shrinkage(*(errors_of(flat)[:1]), identity_statistics(), errors_of(flat)[1]).shrinkage == GRID[-1]
    spoiled = flat | {0.1: math.nan, 1.0: math.inf}
    weights, candidate = errors_of(spoiled)
    choice = choose_shrinkage(weights, identity_statistics(), candidate)
    assert choice.shrinkage == 0.3
    assert choice.errors[0.03] == pytest.approx(0.25)
    weights, candidate = errors_of(dict.fromkeys(GRID, math.nan))
    with pytest.raises(LitBinqError, match=r"closed_form\.shrinkage: no error is finite"):
        choose_shrinkage(weights, identity_statistics(), candidate)


def test_layers_without_output_do_not_decide() -> None:
    weights = {"w": torch.ones(1, 1), "zero": torch.zeros(1, 1)}
    best = dict.fromkeys(GRID, 0.5) | {0.03: 0.1}
    choice = choose_shrinkage(weights, identity_statistics(), lambda _, value: errors_of(best)[1]("w", value))
    assert choice.shrinkage == 0.03
    zero = Statistics(*(torch.zeros(1, 1) for _ in range(3)), 1)
    assert choose_shrinkage(weights, zero, lambda *_: torch.ones(1, 1)).shrinkage == GRID[-1]


def test_windows_are_split() -> None:
    assert split(6, 2) == (slice(0, 6), slice(6, 8))
    assert split(1, 1) == (slice(0, 1), slice(1, 2))
    assert split(7, 0) == (slice(0, 3), slice(3, 7))
    with pytest.raises(LitBinqError, match=r"closed_form\.shrinkage: got auto with 1 training windows") as caught:
        split(1, 0)
    assert "\n" not in str(caught.value)


def test_pooled_statistics_are_those_of_all_tokens() -> None:
    x, x_tilde = two_streams(50, 0)
    parts = [gather((x[rows], x_tilde[rows]), validating=True) for rows in (slice(0, 13), slice(13, 50))]
    both, whole = pooled(*parts), gather((x, x_tilde), validating=True)
    torch.testing.assert_close((both.S, both.C, both.F), (whole.S, whole.C, whole.F))
    assert both.tokens == 50


# ---- inside a block stage ------------------------------------------------------------------------------------------

TRAIN, TOKENS = 6, 12


def workspace(held_out: int, kind: str = "llama") -> Workspace:
    windows = torch.randint(VOCAB, (TRAIN + held_out, TOKENS), generator=torch.Generator().manual_seed(0))
    return Workspace(tiny_model(kind), windows, held_out, CPU, StreamOptions(batch_windows=4), torch.float16)


def entered(held_out: int, **options: Any) -> tuple[BlockStage, Workspace]:
    """The second block's stage after its closed form, the first block being quantized in the same way for all."""
    work = workspace(held_out)
    first = BlockStage(work, 0, ClosedForm(), Tuning())
    first.enter()
    first.leave()
    stage = BlockStage(work, 1, ClosedForm(**options), Tuning())
    stage.enter()
    return stage, work


@pytest.mark.parametrize("by", ["target", "quantized"])
@pytest.mark.parametrize("held_out", [0, 2])
@pytest.mark.parametrize("clip_tokens", [True, False])
def test_a_stage_chooses_what_plain_activations_say(
    clip_tokens: bool, held_out: int, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v of the second block: targets in float64 from the input of q, errors token by token."""
    choices = []

    def remembering(*args: Any) -> Any:
        choices.append(choose_shrinkage(*args))
        return choices[-1]

    monkeypatch.setattr("lit_binq.calibration.block_stage.choose_shrinkage", remembering)
    stage, work = entered(held_out, shrinkage="auto", shrinkage_by=by, clip_tokens=clip_tokens)
    block, s = work.teacher_blocks[1], work.streams
    name = "self_attn.q_proj"
    x, x_tilde = (linear_input(block, name, t, work.calls[1]).double() for t in (s.x, s.x_tilde))
    weights = torch.ones(x.shape[:2], dtype=torch.float64)
    if clip_tokens:
        power = x.square().sum(-1)
        median = power.sort(1).values[:, (TOKENS - 1) // 2, None]
        weights = median / power.maximum(median)
    half = TRAIN if held_out else TRAIN // 2
    fit_on = [t[:half].flatten(0, 1) for t in (x, x_tilde)]
    judge_on = [t[half:].flatten(0, 1) for t in (x, x_tilde)]
    w_fit, w_judge = weights[:half].flatten(), weights[half:].flatten()
    S = torch.einsum("t,tj,tk->jk", w_fit, fit_on[1], fit_on[1]) / len(w_fit)
    C = torch.einsum("t,tj,tk->jk", w_fit, fit_on[0], fit_on[1]) / len(w_fit)
    errors = {}
    for value in GRID:
        ridge = value * S.diagonal().mean() * torch.eye(len(S), dtype=torch.float64)
        errors[value] = 0.0
        for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            W = block.get_submodule(layer).weight.double()
            A = W @ (C + ridge) @ torch.linalg.inv(S + ridge)
            if by == "quantized":
                A = RowColumnSolver().solve(A.float(), (S + ridge).float()).dense().double()
            off = (judge_on[0] @ W.T - judge_on[1] @ A.T).square().sum(1)
            errors[value] += float((w_judge * off).sum() / (w_judge * (judge_on[0] @ W.T).square().sum(1)).sum())
    # A code that hangs on a rounding may fall otherwise in float32.
    assert {v: 3 * e for v, e in choices[0].errors.items()} == pytest.approx(
        errors, rel=1e-2 if by == "quantized" else 1e-3
    )
    assert errors[stage.shrinkage[name]] <= min(errors.values()) * (1 + 1e-2)
    assert max(errors.values()) > 1.01 * min(errors.values())  # else every choice would do


@pytest.mark.parametrize("held_out", [0, 2])
def test_the_weight_is_fitted_on_all_training_windows(held_out: int) -> None:
    """As with the chosen number: the same T, H and hence codes. Held-out windows judge only."""

    @dataclass
    class Keeps(RowColumnSolver):
        def solve(self, T: Tensor, H: Tensor, **options: Any) -> Any:
            seen.append((T, H))
            return super().solve(T, H, **options)

    seen: list[tuple[Tensor, Tensor]] = []
    stage, _ = entered(held_out, shrinkage="auto", shrinkage_by="target", solver=Keeps())
    auto, seen = seen, []
    chosen = stage.shrinkage["self_attn.q_proj"]
    entered(held_out, shrinkage=chosen, solver=Keeps())
    for (T, H), (fixed_T, fixed_H) in zip(auto[:3], seen[:3], strict=True):  # q, k, v: the first group of the block
        torch.testing.assert_close(H, fixed_H)
        torch.testing.assert_close(T, fixed_T, rtol=1e-4, atol=1e-4)


def test_every_group_has_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "lit_binq.calibration.block_stage"):
        stage, _ = entered(2, shrinkage="auto")
    linears = {n for n, m in workspace(2).teacher_blocks[1].named_modules() if isinstance(m, nn.Linear)}
    assert stage.shrinkage.keys() == linears
    assert set(stage.shrinkage.values()) <= set(GRID)
    for group in (("q", "k", "v"), ("gate", "up")):
        prefix = "self_attn" if "q" in group else "mlp"
        assert len({stage.shrinkage[f"{prefix}.{n}_proj"] for n in group}) == 1
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 4
    assert lines[1].startswith(f"block 1, self_attn.o_proj: shrinkage {stage.shrinkage['self_attn.o_proj']:g} of {{0.0")


def test_the_last_linear_alone() -> None:
    """All others take the weights, which need no shrinkage; the probe of them takes the usual one."""
    stage, _ = entered(2, shrinkage="auto", scope="last")
    assert list(stage.shrinkage) == ["mlp.down_proj"]


def test_a_number_chooses_nothing() -> None:
    stage, _ = entered(2, shrinkage=0.3)
    assert stage.shrinkage == {}


@pytest.mark.parametrize("form", [{"amp": True}, {"solver": GroupedSolver()}], ids=["amp", "another format"])
def test_the_candidates_are_solved_as_the_weight_is(form: dict[str, Any]) -> None:
    stage, _ = entered(2, shrinkage="auto", **form)
    assert len(stage.shrinkage) == 7


def test_errors_name_the_block() -> None:
    work = workspace(0)
    work.streams.train = 1
    with pytest.raises(LitBinqError, match=r"block 0, self_attn\.q_proj: closed_form\.shrinkage: got auto with 1"):
        BlockStage(work, 0, ClosedForm(shrinkage="auto"), Tuning()).enter()


# ---- options and whole fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["weight", "naive_output", "pseudo_target"])
def test_auto_is_for_the_true_target(objective: Any) -> None:
    with pytest.raises(LitBinqError, match=rf"closed_form\.shrinkage: got auto with {objective}"):
        ClosedForm(objective=objective, shrinkage="auto")


def test_unknown_words_are_refused() -> None:
    with pytest.raises(LitBinqError, match=r"closed_form\.shrinkage_by: got 'weight', expected one of quantized, targ"):
        ClosedForm(shrinkage_by="weight")  # type: ignore[arg-type]  # the point of the test


NO_TUNING = {"tuning": Tuning(epochs=0), "finish": Tuning(epochs=0)}


def test_the_records_of_a_run_keep_it(make_source: Any, text_file: Path, tmp_path: Path) -> None:
    """In the packed folder too; a resumed run has those of the blocks before; the probe goes by it."""
    options = NO_TUNING | {
        "closed_form": ClosedForm(shrinkage="auto"),
        "diagnostics": DiagnosticsOptions(windows=1, probe=True),
    }
    source = make_source()
    module = fit(source, text_file, tmp_path / "packed", **options)
    stages = read_marker(tmp_path / "packed")["facts"]["stages"]
    assert [s["shrinkage"] for s in stages] == [r.shrinkage for r in module.records]
    assert all(len(s["shrinkage"]) == 7 for s in stages)
    assert json.loads(json.dumps(stages)) == stages
    assert all(block.probe is not None for block in read_diagnostics(tmp_path / "diagnostics.json"))
    last = tmp_path / "packed-ckpt" / "last.ckpt"
    resumed = fit(source, text_file, tmp_path / "again", ckpt_path=last, **options)
    assert [r.shrinkage for r in resumed.records] == [r.shrinkage for r in module.records]
    assert_same(tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_two_processes_choose_alike(held_out: float, make_source: Any, text_file: Path, tmp_path: Path) -> None:
    """From Grams over the windows of both: the choice of a single process, which has the same windows."""
    options = NO_TUNING | {"closed_form": ClosedForm(shrinkage="auto", shrinkage_by="target")}
    source, data = make_source(blocks=1), {"windows": 20, "held_out": held_out}
    fit(source, text_file, tmp_path / "two", trainer=two_processes(), callbacks=[Remember(tmp_path)], data=data,
        **options)  # fmt: skip
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()
    fit(source, text_file, tmp_path / "one", data=data, **options)
    two, one = (read_marker(tmp_path / name)["facts"]["stages"][0]["shrinkage"] for name in ("two", "one"))
    assert len(two) == 7
    if held_out:  # without, the halves of two processes are other windows than those of one
        first = list(itertools.islice(one, 3))
        assert [two[name] for name in first] == [one[name] for name in first]
