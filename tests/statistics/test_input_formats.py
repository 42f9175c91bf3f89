"""Choosing outliers, scales and ranges; whole fits with quantized inputs."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from fitting import KeepEach, Remember, T, assert_same, fit, stored, two_processes
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.formats.activations import plain_scales
from lit_binq.formats.registry import packed_linears
from lit_binq.formats.two_plane.linear import InputFormat, TwoPlaneLinear
from lit_binq.hub.bits import activation_bits
from lit_binq.hub.save_load import load_packed
from lit_binq.solvers import PlanesSolver, Problem, Solver, TwoPlaneSolver
from lit_binq.solvers.gptq2 import UniformTwoBitSolver
from lit_binq.statistics.activation_format import (
    Activations,
    by_credit,
    by_size,
    choose_input_format,
    fit_range,
    output_error,
    quantized_input,
)
from problems import f, problem


def uneven(seed: int, tokens: int = 200, columns: int = 64) -> tuple[Tensor, Tensor]:
    """x (tokens, columns) and energies: columns 0..7 are large but hardly read, 8..15 stretch the range together in
    every fifth token, 16..23 have an offset."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g)
    x[:, :8] *= 6
    x[::5, 8:16] += 25
    x[:, 16:24] -= 8
    energies = 0.5 + torch.rand(columns, generator=g)
    energies[:8] *= 0.01
    return x, energies


def error_of(x: Tensor, energies: Tensor, outliers: Tensor) -> float:
    return output_error(x, InputFormat(4, outliers), energies)


# --- outliers


@pytest.mark.parametrize("count", [8, 16, 24])
def test_outliers_by_the_objective_beat_those_by_size(count: int) -> None:
    for seed in range(4):
        x, energies = uneven(seed, columns=96)
        a = choose_input_format(Activations(4, count), x, energies)
        b = choose_input_format(Activations(4, count, outliers_by="size"), x, energies)
        assert torch.equal(b.outliers, by_size(x, torch.ones(len(x)), count))
        assert output_error(x, a, energies) <= output_error(x, b, energies) * 1.02
    x, energies = uneven(9, columns=96)
    one = torch.ones(len(x))
    assert error_of(x, energies, by_credit(x, energies.double(), one, 16)) < 0.7 * error_of(
        x, energies, by_size(x, one, 16)
    )


def test_columns_that_stretch_the_range_only_together_get_credit() -> None:
    """Eight columns rise at once: taking out any one of them changes no range."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=g)
    x[:, :8] *= 1.5
    x[::3, 40:48] += 20
    energies = torch.ones(64)
    assert by_credit(x, energies.double(), torch.ones(100), 8).tolist() == list(range(40, 48))


def test_own_error_counts() -> None:
    """Where all columns are alike but for their energy, those with most of it are taken."""
    x = torch.rand(300, 32, generator=torch.Generator().manual_seed(0))
    energies = torch.ones(32)
    energies[[3, 5, 8, 13, 21, 22, 30, 31]] = 500.0
    outliers = choose_input_format(Activations(4, 8), x, energies).outliers
    assert outliers.tolist() == [3, 5, 8, 13, 21, 22, 30, 31]


@pytest.mark.parametrize("seed", range(3))
def test_choice_is_near_the_best_of_all_sets(seed: int) -> None:
    """All 1287 sets of eight of thirteen columns."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 13, generator=g) * torch.rand(13, generator=g) * 5
    energies = torch.rand(13, generator=g)
    errors = [error_of(x, energies, torch.tensor(c)) for c in itertools.combinations(range(13), 8)]
    mine = error_of(x, energies, by_credit(x, energies.double(), torch.ones(40), 8))
    assert sum(e < mine for e in errors) < 0.03 * len(errors)


def test_weights_of_tokens_decide() -> None:
    """Columns that are large only in tokens without weight are no outliers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 32, generator=g)
    x[:5, :8] = 1000
    x[:, 8:16] *= 5
    weights = torch.ones(100)
    weights[:5] = 0
    chosen = choose_input_format(Activations(4, 8), x, torch.ones(32), weights)
    assert chosen.outliers.tolist() == list(range(8, 16))


@pytest.mark.parametrize(("columns", "expected"), [(32, 8), (48, 8), (31, 0), (576, 128), (1536, 128), (256, 64)])
def test_small_layers_get_fewer(columns: int, expected: int) -> None:
    assert Activations(4, 128).outliers_of(columns) == expected


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"bits": 5}, "activations.bits: got 5, expected 0, 4 or 8"),
        ({"bits": 4, "outliers": 12}, "multiple of 8"),
        ({"bits": 8, "outliers": 8}, "only with `bits: 4`"),
        ({"bits": 4, "outliers_by": "luck"}, "expected `objective` or `size`"),
    ],
)
def test_wrong_options_give_one_line(given: dict[str, Any], match: str) -> None:
    with pytest.raises(LitBinqError, match=match) as caught:
        Activations(**given)
    assert "\n" not in str(caught.value)


def test_other_formats_take_inputs_as_they_are() -> None:
    with pytest.raises(LitBinqError, match="got 4 bits with PlanesSolver, whose format takes inputs as they are"):
        ClosedForm(solver=PlanesSolver(), activations=Activations(4))


# --- scales and ranges


@given(seed=st.integers(0, 200), static=st.booleans(), outliers=st.sampled_from([0, 8, 16]))
@settings(deadline=None, max_examples=25)
def test_refitting_never_hurts(seed: int, static: bool, outliers: int) -> None:
    """Scale smoothing against evenly spread levels, with the same outliers, as float16 stores both."""
    x, energies = uneven(seed, 60)
    a = choose_input_format(Activations(4, outliers, static=static), x, energies)
    b = choose_input_format(Activations(4, outliers, static=static, refit=False), x, energies)
    assert torch.equal(a.outliers, b.outliers)
    assert b.scales is None
    assert output_error(x, a, energies) <= output_error(x, b, energies) * (1 + 1e-5)
    for inputs in (a, b):
        inputs.check(64)


def test_extremes_are_survived() -> None:
    for x in (torch.zeros(5, 32), torch.full((5, 32), 7.0), torch.full((1, 32), -1e5)):
        for static in (False, True):
            for options in (Activations(4, 8, static=static), Activations(8, static=static)):
                inputs = choose_input_format(options, x, torch.ones(32))
                inputs.check(32)
                torch.testing.assert_close(quantized_input(x, inputs), x)


def test_static_ranges_clip_what_is_rare() -> None:
    """One wild value of thousands: cutting it off is cheaper than a range that holds it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=g)
    x[7, 3] = 40
    lo, R = fit_range(x, torch.ones(32), torch.ones(200), torch.arange(16) / 15).tolist()
    assert lo + R < 20
    plain = InputFormat(4, torch.empty(0, dtype=torch.int64), None, torch.tensor([lo, R, 0.0, 0.0]))
    whole = [float(x.min()), float(x.max() - x.min()), 0.0, 0.0]
    assert output_error(x, plain, torch.ones(32)) < 0.5 * output_error(
        x, InputFormat(4, plain.outliers, None, torch.tensor(whole)), torch.ones(32)
    )


def test_what_the_layer_computes_is_what_was_judged() -> None:
    """`quantized_input` times the dense weight is the packed layer's output."""
    x, energies = uneven(3, 50)
    W, H = problem(6, 64, 0)
    for options in (Activations(4, 16), Activations(4, 16, static=True), Activations(8), Activations(4, refit=False)):
        inputs = choose_input_format(options, x, energies)
        layer = UniformTwoBitSolver(16).solve(Problem(W.float(), H.float(), inputs=inputs)).pack()
        expected = quantized_input(x, inputs) @ layer.dequantize().T
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(layer(x), x @ layer.dequantize().T, atol=1e-3)


# --- the uniform baseline


def test_error_feedback_beats_rounding_and_clipping_beats_none() -> None:
    W, H = (t.float() for t in problem(8, 64, 0))
    fed = f(UniformTwoBitSolver(16).solve(Problem(W, H)).dense(), W, H)
    rounded = f(UniformTwoBitSolver(16).solve(Problem(W, torch.eye(64))).dense(), W, H)
    assert fed < 0.8 * rounded
    W[:, ::16] *= 6  # one weight a group that is cheaper to clip than to reach
    lo, hi = W.unflatten(1, (4, 16)).aminmax(dim=2, keepdim=True)
    grid = lo + (hi - lo) / 3 * ((W.unflatten(1, (4, 16)) - lo) / (hi - lo) * 3).round()
    clipped = UniformTwoBitSolver(16).solve(Problem(W, torch.eye(64))).dense()
    assert float((clipped - W).square().sum()) < float((grid.flatten(1) - W).square().sum())


@pytest.mark.parametrize("K", [64, 40, 24])
def test_four_evenly_spaced_levels(K: int) -> None:
    """In every row and group; what is packed is what was solved, bit for bit."""
    W, H = (t.float() for t in problem(5, K, 1))
    outliers = torch.tensor([1, 2, 5, 7, 8, 11, 20, 23])
    for inputs in (InputFormat(), InputFormat(4, outliers)):
        s = UniformTwoBitSolver(16).solve(Problem(W, H, inputs=inputs))
        dense = s.stored_dense()
        for begin in range(0, K, 16):
            for row in dense[:, begin : begin + 16]:
                steps = row.unique().diff()
                assert len(steps) <= 3
                ratio = steps / steps.min()
                torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-2)
        assert torch.equal(s.pack().dequantize(), s.dense())


def test_first_column_of_a_group_is_rounded_to_the_nearest() -> None:
    """With H = I nothing is fed back: every weight takes the nearest level of its group."""
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    s = UniformTwoBitSolver(16).solve(Problem(W, torch.eye(32)))
    m, a1, a2 = s.levels.unbind(-1)
    levels = torch.stack((m - a1 - a2, m - a1 + a2, m + a1 - a2, m + a1 + a2), -1)
    distances = (W.unflatten(1, (2, 16))[..., None] - levels[:, :, None]).abs().amin(-1).flatten(1)
    torch.testing.assert_close((s.dense() - W).abs(), distances, rtol=0, atol=1e-5)


# --- whole fits

QUANTIZED = ClosedForm(solver=TwoPlaneSolver(16), activations=Activations(4, 8))


def prepared_stage(model: PreTrainedModel, closed_form: ClosedForm = QUANTIZED) -> BlockStage:
    ids = torch.randint(0, 256, (20, T), generator=torch.Generator().manual_seed(0))
    work = Workspace(model, ids, 4, torch.device("cpu"), StreamOptions(), torch.float16)
    stage = BlockStage(work, 0, closed_form, BlockTuning(epochs=1, lr_codes=0.002))
    stage.enter()
    return stage


def test_layers_with_one_input_share_its_format() -> None:
    stage = prepared_stage(tiny_model("llama"), QUANTIZED)
    layers = packed_linears_of(stage)
    q, k, o = (layers[f"self_attn.{n}_proj"].inputs() for n in "qko")
    assert torch.equal(q.outliers, k.outliers)
    assert q.scales is not None
    assert k.scales is not None
    assert torch.equal(q.scales, k.scales)
    assert not torch.equal(q.scales, plain_scales().half().float())
    assert not torch.equal(q.outliers, o.outliers)
    assert stage.activation_bits["mlp.down_proj"] == pytest.approx((8 * 8 + 4 * 40) / 48)


def packed_linears_of(stage: BlockStage) -> dict[str, Any]:
    stage.tuning.epochs = 0
    stage.enter()
    found = packed_linears(stage.module)
    assert all(isinstance(m, TwoPlaneLinear) for m in found.values())
    return found


def test_statistics_are_of_the_quantized_input() -> None:
    """S over Q(x~): with one token repeated it is the outer product of the rounded token."""
    stage = prepared_stage(tiny_model("llama"))
    block, s = stage.work.teacher_blocks[0], stage.work.streams
    stage.module = stage.work.new_block(0)
    stage._inputs = stage._input_format(["self_attn.q_proj"])
    s.train = 1
    stats = stage._statistics(block, "self_attn.q_proj")
    assert stats is not None
    norm = block.get_submodule("input_layernorm")
    with torch.no_grad():
        x, x_tilde = norm(s.x[:1]).flatten(0, 1), norm(s.x_tilde[:1]).flatten(0, 1)
        x_hat = quantized_input(x_tilde, stage._inputs)
        omega = stage._token_weights(x, 1)[:, None]
    torch.testing.assert_close(stats.S, (x_hat * omega).T @ x_hat / len(x))
    torch.testing.assert_close(stats.C, (x * omega).T @ x_hat / len(x))
    assert not torch.allclose(stats.S, (x_tilde * omega).T @ x_tilde / len(x), rtol=1e-3)


def test_the_sample_is_spread_over_windows_and_places() -> None:
    """Every token once where all fit; of more, equally many from every window, at places all over."""
    stage = prepared_stage(tiny_model("llama"))
    stage.module = stage.work.new_block(0)
    x, omega = stage._sample("self_attn.o_proj")  # its input depends on the place
    assert len(x) == len(omega) == 16 * T  # training windows only
    assert len(x.unique(dim=0)) > 0.9 * len(x)


def test_tuning_sees_quantized_inputs_and_lowers_the_loss() -> None:
    stage = prepared_stage(tiny_model("llama"))
    rows = torch.arange(16)
    groups = stage.parameter_groups()
    before = float(stage.loss(rows).detach())
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(15):
        optimizer.zero_grad()
        stage.loss(rows).backward()
        optimizer.step()
    after = float(stage.loss(rows).detach())
    assert after < 0.97 * before
    stage.leave()
    packed = [m for m in packed_linears(stage.work.blocks[0]).values() if isinstance(m, TwoPlaneLinear)]
    assert all(m.activation_bits == 4 and m.outliers == 8 for m in packed)


@pytest.mark.grid(1)
@pytest.mark.parametrize("solver", [TwoPlaneSolver(16), UniformTwoBitSolver(16)])
@pytest.mark.parametrize("activations", [Activations(4, 8), Activations(8, static=True)])
def test_a_fit_reloads_bit_identically(
    model_folder: Path, text_file: Path, tmp_path: Path, activations: Activations, solver: Solver
) -> None:
    remember = Remember()
    form = ClosedForm(solver=solver, activations=activations)
    module = fit(model_folder, text_file, tmp_path / "packed", callbacks=[remember], closed_form=form)
    model, _ = load_packed(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
    expected = 8.0 if activations.bits == 8 else (6 * 32 * 5 + 48 * 14 / 3) / (6 * 32 + 48)
    assert activation_bits(model) == pytest.approx(expected)
    assert module.records[0].activation_bits["mlp.up_proj"] == (8.0 if activations.bits == 8 else 5.0)


@pytest.mark.slow
def test_interrupted_fits_go_on_to_the_same_bits(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    keep = KeepEach(str(tmp_path / "kept"))
    options: dict[str, Any] = {"closed_form": QUANTIZED, "kv_bits": 4}
    fit(model_folder, text_file, tmp_path / "whole", callbacks=[keep], **options)
    for i in (1, 2):
        path = tmp_path / "kept" / f"stage-{i}.ckpt"
        fit(model_folder, text_file, tmp_path / f"resumed-{i}", ckpt_path=path, **options)
        assert_same(tmp_path / "whole", tmp_path / f"resumed-{i}")


@pytest.mark.slow
def test_two_processes_agree(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Both ranks end with the same bits; the format is chosen by the first."""
    digests = tmp_path / "digests"
    digests.mkdir()
    fit(
        model_folder,
        text_file,
        tmp_path / "two",
        callbacks=[Remember(digests)],
        closed_form=QUANTIZED,
        trainer=two_processes(),
        tuning=BlockTuning(epochs=1),
        end_to_end=ModelTuning(epochs=0),
    )
    assert (digests / "rank-0").read_text() == (digests / "rank-1").read_text()
    assert any("input_scales" in name for name in stored(tmp_path / "two"))
