"""What every published method promises: packing, extremes, the command line, a fit."""

import json

import pytest
import torch
from conftest import tiny_model
from jsonargparse import auto_cli

from lit_binq.calibration.module import BinQCalibration
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq.formats.dense_only import CountedSolution
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import packed_linears
from lit_binq.formats.row_column import RowColumn
from lit_binq.hub.bits import file_bits
from lit_binq.hub.save_load import load_packed
from lit_binq.solvers import (
    ARB,
    ARBRC,
    ARBX,
    CGB,
    PBLLM,
    BiLLM,
    OutputAlignment,
    Problem,
    RowColumnSolver,
    Solver,
)
from lit_binq.solvers.baselines.zones import Levels
from problems import f, problem

ALL: list[Solver] = [
    ARB(),
    ARBRC(),
    ARBX(),
    BiLLM(block=8),
    CGB(block=8),
    PBLLM(),
    RowColumnSolver(),
]


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 17)])
def test_every_method_packs_what_it_found(solver: Solver, shape: tuple[int, int]) -> None:
    T, H = (t.float() for t in problem(*shape, 0))
    kept = T.clone(), H.clone()
    s = solver.solve(Problem(T, H))
    assert torch.equal(T, kept[0])
    assert torch.equal(H, kept[1])
    assert torch.isfinite(s.dense()).all()
    assert f(s.dense(), T, torch.eye(shape[1])) < 30 * f(torch.zeros_like(T), T, torch.eye(shape[1]))
    layer = s.pack(torch.ones(shape[0]))
    torch.testing.assert_close(layer.dequantize(), s.dense(), rtol=4e-3, atol=4e-3)
    assert layer.deployable == solver.deployable == isinstance(s, RowColumn)
    if isinstance(s, CountedSolution):  # the dense weight is kept as it is, with scales as float16 holds them
        assert torch.equal(layer.weight, s.rounded().dense())
        assert layer.true_bits() == s.stored_bits() / T.numel()


def test_bits_are_counted_as_the_papers_formats_take_them() -> None:
    """Codes padded to bytes, every scale as float16, positions; columns and rows that are no whole bytes."""
    N, K = 6, 20
    T, H = (t.float() for t in problem(N, K, 3))
    codes = N * 24
    assert ARB().solve(Problem(T, H)).stored_bits() == ARBX().solve(Problem(T, H)).stored_bits() == codes + 32 * N
    assert PBLLM(share=0.1).solve(Problem(T, H)).stored_bits() == 2 * codes + 32 * N + 8 * 12
    levels = 16 * N * 3 * 2 * 4  # three blocks of 8 columns, two zones
    assert BiLLM(block=8).solve(Problem(T, H)).stored_bits() == 2 * codes + levels + 24
    assert CGB(block=8).solve(Problem(T, H)).stored_bits() == 2 * codes + levels + 24 + 16 * K


@pytest.mark.parametrize(
    ("solver", "name"), [(ARB(), "row_mean"), (BiLLM(block=8), "levels"), (PBLLM(), "row_scale")], ids=str
)
def test_scales_that_float16_cannot_hold_are_refused(solver: Solver, name: str) -> None:
    T, H = (t.float() for t in problem(4, 16, 0))
    with pytest.raises(LitBinqError, match=f"{name} has values that float16 cannot hold"):
        solver.solve(Problem(1e8 * (T + 1), H)).pack()


def test_column_scales_of_any_size_fit() -> None:
    T, H = (t.float() for t in problem(4, 16, 0))
    s = CGB(block=8).solve(Problem(T, H))
    assert s.c is not None
    moved = Levels(s.levels * 2.0**-30, s.codes, s.group, s.salient, s.c * 2.0**30)
    assert torch.equal(moved.pack().dequantize(), s.pack().dequantize())
    s.c[3] = 0  # a dead column sets no mean
    assert float(s.pack().dequantize()[:, 3].abs().max()) == 0


@pytest.mark.parametrize("solver", ALL, ids=lambda s: type(s).__name__)
def test_extremes(solver: Solver) -> None:
    _, H = (t.float() for t in problem(1, 16, 0))
    assert float(solver.solve(Problem(torch.zeros(4, 16), H)).dense().abs().max()) == 0
    T = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    T[1] = 0
    T[:, 3] = 0
    for metric in (H, torch.eye(16), torch.ones(16, 16) + 1e-6 * torch.eye(16)):
        assert torch.isfinite(solver.solve(Problem(T, metric)).dense()).all()
    bad = T.clone()
    bad[0, 0] = float("nan")
    for pair in ((bad, H), (T, H * float("inf"))):
        with pytest.raises(LitBinqError, match="target or metric holds NaN or inf"):
            solver.solve(Problem(*pair))
    scaled = solver.solve(Problem(T * 2.0**-6, H * 4.0)).dense()
    torch.testing.assert_close(scaled * 2.0**6, solver.solve(Problem(T, H)).dense(), rtol=1e-4, atol=1e-4)


def parsed(*arguments: str) -> ClosedForm:
    """What the command line makes of options of `closed_form`."""

    def given(closed_form: ClosedForm) -> ClosedForm:
        return closed_form

    return auto_cli(given, args=[*arguments], as_positional=False)


@pytest.mark.parametrize("name", ["ARB", "ARBRC", "ARBX", "BiLLM", "CGB", "OutputAlignment", "PBLLM"])
def test_each_method_is_one_line_of_yaml(name: str) -> None:
    assert type(parsed(f"--closed_form.solver={name}").solver).__name__ == name


def test_options_on_the_command_line() -> None:
    text = '{"objective": "pseudo_target", "shrinkage": 0, "solver": {"class_path": "CGB", "init_args": %s}}'
    form = parsed("--closed_form", text % '{"block": 64}')
    assert form.solver == CGB(block=64)
    form = parsed("--closed_form.solver=RowColumnSolver", "--closed_form.solver.rounds=3")
    assert form.solver == RowColumnSolver(rounds=3)


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", ["CGB", "ARBX", "PBLLM"])
def test_a_fit_keeps_dense_weights_and_says_so(name: str, tokenizer, text_file, tmp_path, caplog, capsys) -> None:
    tiny_model("llama", blocks=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = {"path": str(text_file)}
    model = {"model": str(tmp_path / "model"), "packed": str(tmp_path / "packed"), "tuning": {"epochs": 0}}
    config = {
        "model": model | {"closed_form": {"solver": name, "objective": "pseudo_target"}},
        "data": {"train": text, "window_length": 32, "windows": 8, "evaluation": {"text": text}}
        | {"eval_windows": 2, "eval_length": 32},
        "checkpoint": {"dirpath": str(tmp_path / "checkpoint")},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO"):
        assert cli.main(["fit", "--config", str(tmp_path / "config.json")]) == 0
    assert "published baseline" in caplog.text
    assert "true bits (counted, not stored)" in caplog.text
    packed = packed_linears(load_packed(tmp_path / "packed")[0])
    assert {layer.kind for layer in packed.values()} == {"dense_only"}
    assert len(packed) == 7
    manifest = read_manifest(tmp_path / "packed")
    counted = sum(entry["counted_bits"] for entry in manifest["linears"].values())
    assert manifest["true_bits"] == counted / sum(layer.weight.numel() for layer in packed.values()) < 8
    assert file_bits(tmp_path / "packed") > 16  # what the folder takes is another matter
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "packed"), str(tmp_path / "onnx")]) == 1
    assert "published baseline's dense weight" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("stage", ["tuning", "end_to_end"])
@pytest.mark.parametrize("solver", [ARB(), ARBX(), BiLLM(), CGB(), PBLLM()], ids=lambda s: type(s).__name__)
def test_tuning_a_baseline_is_refused_at_once(solver: Solver, stage: str) -> None:
    epochs = {"tuning": BlockTuning(epochs=0), "end_to_end": ModelTuning(epochs=0)}
    BinQCalibration("nowhere", closed_form=ClosedForm(solver=solver), **epochs)
    epochs[stage] = type(epochs[stage])(epochs=2)
    with pytest.raises(LitBinqError, match=rf"^{stage}\.epochs: got 2 with {type(solver).__name__}, a published"):
        BinQCalibration("nowhere", closed_form=ClosedForm(solver=solver), **epochs)


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        (BiLLM, {"block": 0}, r"solver\.block: got 0"),
        (OutputAlignment, {"scope": "first"}, r"solver\.scope: got 'first', expected `all` or `last`"),
        (OutputAlignment, {"rounds": -1}, r"solver\.rounds: got -1"),
        (CGB, {"block": -1}, r"solver\.block: got -1"),
        (PBLLM, {"share": 1.5}, r"solver\.share: got 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(solver: type[Solver], options: dict, words: str) -> None:
    with pytest.raises(LitBinqError, match=words) as caught:
        solver(**options)
    assert "\n" not in str(caught.value)
