"""Diagnostics through a fit: every block measured, right for what is stored, kept beside it, drawn."""

import json

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from fitting import KeepEach, assert_same, fit
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.result import diagnostics_path
from lit_binq.cli import main as cli
from lit_binq.diagnostics.measure import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.save_load import load_packed
from lit_binq.models.blocks import find_blocks
from lit_binq.models.load import load_model
from lit_binq.report.runs import load_run
from lit_binq.solvers import PlanesSolver
from lit_binq.utils.json_records import DIAGNOSTICS, read_diagnostics

OFF, NO_MODEL_STAGE = BlockTuning(epochs=0), ModelTuning(epochs=0)
PROBED = {"weight", "pseudo_target", "true_target"}


@torch.no_grad()
def record(model: PreTrainedModel, windows: Tensor, layers: list[str]) -> dict[str, Tensor]:
    """Inputs (tokens, K) of the named layers and outputs (tokens, d) of the blocks, float64, from one plain pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, t: Tensor) -> None:
        seen[name] = t.double().flatten(0, -2)

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: keep(n, args[0]))
    for i, block in enumerate(find_blocks(model)):
        block.register_forward_hook(
            lambda _, args, out, n=f"block {i}": keep(n, out if isinstance(out, Tensor) else out[0])
        )
    model(input_ids=windows, use_cache=False)
    return seen


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_figures_are_those_of_the_packed_model_and_its_teacher(kind, make_source, text_file, tmp_path):
    """Recomputed from two whole models, as they are on disk, by the definitions."""
    source = make_source(kind)
    options = DiagnosticsOptions(windows=3)
    module = fit(source, text_file, tmp_path / "packed", end_to_end=NO_MODEL_STAGE, diagnostics=options,
                 closed_form=ClosedForm(solver=PlanesSolver(), bits=2.6))  # fmt: skip
    blocks = read_diagnostics(tmp_path / DIAGNOSTICS)
    assert [b.block for b in blocks] == [0, 1]
    assert blocks == module.measures
    windows = module.trainer.datamodule.train_windows[:3]
    teacher, student = load_model(str(source)), load_packed(tmp_path / "packed")[0]
    packed = packed_linears(student)
    full, quantized = record(teacher, windows, list(packed)), record(student, windows, list(packed))
    for i, block in enumerate(blocks):
        assert (block.windows, block.window_length) == (3, windows.shape[1])
        assert block.probe is None
        y, y_hat = full[f"block {i}"], quantized[f"block {i}"]
        error, norm = (y_hat - y).square().sum(-1), y.square().sum(-1)
        assert block.after.block == pytest.approx(float(error.sum() / norm.sum()), rel=1e-4)
        assert block.after.token == pytest.approx(float((error / norm).mean()), rel=1e-4)
        assert block.before is not None
        assert block.before.block != block.after.block  # two epochs of tuning lie between
        prefix = next(n for n, m in teacher.named_modules() if m is find_blocks(teacher)[i])
        mine = {n.removeprefix(f"{prefix}."): n for n in packed if n.startswith(f"{prefix}.")}
        assert block.linears.keys() == mine.keys()
        for short, name in mine.items():
            linear = teacher.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            W, W_hat = linear.weight.detach().double(), packed[name].dequantize().double()
            true, pseudo, got = full[name] @ W.T, quantized[name] @ W.T, quantized[name] @ W_hat.T
            measured = block.linears[short]
            assert measured.weight_error == pytest.approx(float((W - W_hat).norm()), rel=1e-5)
            assert measured.output_error_relative == pytest.approx(float((got - true).norm() / true.norm()), rel=1e-3)
            assert measured.activation_error == pytest.approx(float((got - pseudo).norm()), rel=1e-3)
            cosine = nn.functional.cosine_similarity(got, true, dim=-1).mean()
            assert measured.output_similarity == pytest.approx(float(cosine), abs=1e-4)
        assert block.attention_divergence is not None
        assert block.attention_divergence > 0


def test_the_loss_before_tuning_is_that_of_the_closed_form(make_source, text_file, tmp_path):
    source, options = make_source(blocks=1), DiagnosticsOptions(windows=16, attention=False)
    closed, tuned = (
        fit(source, text_file, tmp_path / str(e) / "packed", tuning=BlockTuning(epochs=e), end_to_end=NO_MODEL_STAGE,
            diagnostics=options, data={"held_out": 0.0, "windows": 16})
        for e in (0, 2)
    )  # fmt: skip
    (a,), (b,) = closed.measures, tuned.measures
    assert a.before is not None
    assert vars(a.before) == pytest.approx(vars(a.after), rel=1e-3)  # but for norms and biases, which are rounded
    assert a.before == b.before
    assert a.attention_divergence is None
    # The same windows as the stage's own score, which the trainer reports.
    assert tuned.records[0].before == pytest.approx(b.before.token, rel=1e-4)
    assert tuned.records[0].after == pytest.approx(b.after.token, rel=2e-2)


@pytest.mark.slow
def test_resuming_keeps_the_measures_of_earlier_blocks(make_source, text_file, tmp_path):
    """Bit for bit, the probe's too; measuring changes nothing of the model."""
    source, keep, options = make_source(), KeepEach(str(tmp_path / "kept")), DiagnosticsOptions(windows=2, probe=True)
    places = {name: tmp_path / name / "packed" for name in ("whole", "resumed", "off")}
    fit(source, text_file, places["whole"], callbacks=[keep], diagnostics=options)
    fit(source, text_file, places["off"])
    assert_same(places["whole"], places["off"])
    assert not (tmp_path / "off" / DIAGNOSTICS).exists()
    whole = json.loads((tmp_path / "whole" / DIAGNOSTICS).read_text())
    for stage in (1, 3):
        fit(source, text_file, places["resumed"], ckpt_path=tmp_path / "kept" / f"stage-{stage}.ckpt",
            diagnostics=options)  # fmt: skip
        assert json.loads((tmp_path / "resumed" / DIAGNOSTICS).read_text()) == whole
        (tmp_path / "resumed" / DIAGNOSTICS).unlink()
    for block in read_diagnostics(tmp_path / "whole" / DIAGNOSTICS):
        assert block.probe is not None
        assert block.probe.linears.keys() == block.linears.keys()
        for layer in block.probe.linears.values():
            assert layer.keys() == PROBED
            assert all(m.loss.token is not None and m.loss.token >= 0 for m in layer.values())


def test_a_run_without_diagnostics_does_not_keep_those_of_an_older_one(make_source, text_file, tmp_path):
    source, off = make_source(blocks=1), {"tuning": OFF, "end_to_end": NO_MODEL_STAGE}
    fit(source, text_file, tmp_path / "packed", diagnostics=DiagnosticsOptions(windows=1), **off)
    assert len(load_run(tmp_path).blocks) == 1
    fit(source, text_file, tmp_path / "packed", **off)
    assert not (tmp_path / DIAGNOSTICS).exists()
    assert load_run(tmp_path).blocks == []
    (tmp_path / DIAGNOSTICS).write_text('{"of": "somebody else"}')
    fit(source, text_file, tmp_path / "packed", **off)
    assert (tmp_path / DIAGNOSTICS).read_text() == '{"of": "somebody else"}'


def test_runs_side_by_side_keep_their_own(make_source, text_file, tmp_path):
    """Packed folders of other names than `packed` may share the folder around them."""
    source, off = make_source(), {"tuning": OFF, "end_to_end": NO_MODEL_STAGE}
    for n in (1, 2):
        fit(source, text_file, tmp_path / f"model-{n}", diagnostics=DiagnosticsOptions(windows=n), **off)
    for n in (1, 2):
        assert [b.windows for b in load_run(tmp_path / f"model-{n}").blocks] == [n, n]
        load_packed(tmp_path / f"model-{n}")
    assert not (tmp_path / DIAGNOSTICS).exists()
    assert diagnostics_path(tmp_path / "packed") == tmp_path / DIAGNOSTICS


def test_a_fit_that_cannot_write_leaves_no_diagnostics(make_source, text_file, tmp_path, monkeypatch):
    def full(*args, **options):
        raise LitBinqError("no space left")

    monkeypatch.setattr("lit_binq.calibration.result.save_packed", full)
    with pytest.raises(LitBinqError, match="no space left"):
        fit(make_source(blocks=1), text_file, tmp_path / "run" / "packed", tuning=OFF, end_to_end=NO_MODEL_STAGE,
            diagnostics=DiagnosticsOptions(windows=1))  # fmt: skip
    assert not (tmp_path / "run" / DIAGNOSTICS).exists()
    assert not (tmp_path / "run" / "packed").exists()


def test_more_windows_than_there_are_take_all(make_source, text_file, tmp_path):
    options = DiagnosticsOptions(windows=1000, attention=False)
    module = fit(make_source(blocks=1), text_file, tmp_path / "packed", tuning=OFF, end_to_end=NO_MODEL_STAGE,
                 diagnostics=options, data={"windows": 6})  # fmt: skip
    assert [b.windows for b in module.measures] == [6]


# ---- the command line ----------------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error; no traceback is above it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_fit_and_report_from_the_command_line(make_source, text_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run, text = tmp_path / "run", {"path": str(text_file)}
    config = {
        "model": {
            "model": str(make_source()),
            "packed": str(run / "packed"),
            "tuning": {"epochs": 1},
            "diagnostics": {"windows": 2, "probe": True},
        },
        "data": {"train": text, "window_length": 48, "windows": 12},
        "checkpoint": {"dirpath": str(tmp_path / "checkpoint")},
        "trainer": {"accelerator": "cpu", "devices": 1},
        "evaluate": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    assert (run / DIAGNOSTICS).is_file()
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    pictures = sorted((run / "report").glob("*.png"))
    assert len(pictures) >= 4
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    line = one_line(capsys)
    assert line.startswith("litbinq report: error: run ")
    assert "no such folder" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.diagnostics.windows", "-1"], ["diagnostics.windows", "-1"]),
        (["--model.diagnostics.probe", "true"], ["diagnostics.probe", "diagnostics.windows"]),
        (["--model.closed_form.bits", "1.5"], ["closed_form.bits", "RowColumnSolver", "fixed size"]),
    ],
)
def test_options_that_cannot_work_are_one_line(arguments, words, text_file, tmp_path, capsys):
    base = ["fit", "--model.model", "nowhere", "--data.train", json.dumps({"path": str(text_file)})]
    place = ["--model.packed", str(tmp_path / "packed"), "--checkpoint.dirpath", str(tmp_path / "checkpoint")]
    assert cli.main([*base, *place, *arguments]) == 1
    line = one_line(capsys)
    assert line.startswith("litbinq fit: error: ")
    assert [w for w in words if w not in line] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["amp", "scope"])
def test_options_that_moved_say_where_to(option, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model": {"closed_form": {option: "last"}}}))
    for arguments in ([f"--model.closed_form.{option}=last"], ["--config", str(config)]):
        with pytest.raises(SystemExit):
            cli.main(["fit", *arguments, "--model.model", "nowhere"])
        line = one_line(capsys)
        assert f"closed_form.{option}" in line
        assert f"OutputAlignment, with its option `{option}`" in line
