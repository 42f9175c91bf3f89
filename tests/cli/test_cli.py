"""The command line: the whole way on a tiny model, help, exit codes, and bad input in one line."""

import csv
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from command import one_line
from lit_binq.cli import main as cli


@pytest.fixture(scope="module")
def way(tmp_path_factory, tokenizer, text_file):
    """A folder in which a tiny model has been fitted by `litbinq fit --config`."""
    folder = tmp_path_factory.mktemp("way")
    tiny_model("llama", tied=False).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = {"path": str(text_file)}
    config = {
        "model": {"model": str(folder / "model"), "packed": str(folder / "packed"), "tuning": {"epochs": 1}},
        "data": {"train": text, "window_length": 48, "windows": 12, "evaluation": {"text": text}}
        | {"eval_windows": 4, "eval_length": 48},
        "checkpoint": {"dirpath": str(folder / "checkpoint")},
        "trainer": {"accelerator": "cpu", "devices": 1},
        "results": str(folder / "results.json"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder


def test_a_fit_leaves_its_options_and_figures_beside_the_result(way, capsys):
    (logs,) = (way / "logs").iterdir()
    rows = list(csv.DictReader((logs / "metrics.csv").read_text().splitlines()))
    assert [i for i, row in enumerate(rows) if row["lr"]] == [0, 1]  # an epoch of each block
    assert rows[0]["loss/block_0"]
    assert rows[1]["loss/block_1"]
    assert rows[-1]["ppl_packed/text"]
    assert yaml.safe_load((logs / "hparams.yaml").read_text())["tuning"]["epochs"] == 1
    capsys.readouterr()
    again = ["--model.packed", str(way / "again" / "packed"), "--preflight_only"]
    assert cli.main(["fit", "--config", str(way / "options.yaml"), *again]) == 0
    assert not (way / "again").exists()


def test_predict_writes_the_perplexity_of_every_window(way):
    assert cli.main(["predict", "--config", str(way / "config.yaml")]) == 0
    rows = list(csv.DictReader((way / "perplexity.csv").read_text().splitlines()))
    assert [row["window"] for row in rows] == ["0", "1", "2", "3"]
    whole = json.loads((way / "results.json").read_text())["perplexity"]["text"]
    for kind in ("packed", "fp"):
        mean = sum(math.log(float(row[kind])) for row in rows) / 4  # windows are equally long
        assert math.exp(mean) == pytest.approx(whole[kind], rel=1e-5)


def test_fit_writes_results_beside_their_bits(way):
    results = json.loads((way / "results.json").read_text())
    assert results["perplexity"]["text"].keys() == {"packed", "fp"}
    assert results["calibration_tokens"] == 11 * 48
    tensors = load_file(way / "packed" / "model.safetensors")
    stored = [t for n, t in tensors.items() if n.endswith(("codes", "row_scale", "col_scale"))]
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert results["true_bits"] == pytest.approx(sum(8 * t.numel() * t.element_size() for t in stored) / weights)


def test_validate_gives_the_figures_of_the_fit(way, tmp_path):
    out = tmp_path / "again.json"
    assert cli.main(["validate", "--config", str(way / "config.yaml"), "--results", str(out)]) == 0
    first, again = (json.loads(p.read_text()) for p in (way / "results.json", out))
    assert again["perplexity"] == first["perplexity"]


def test_validate_without_full_precision(way, tmp_path):
    out = tmp_path / "packed_only.json"
    arguments = ["--model.compare_fp", "false", "--results", str(out)]
    assert cli.main(["validate", "--config", str(way / "config.yaml"), *arguments]) == 0
    alone = json.loads(out.read_text())["perplexity"]["text"]
    assert alone == {"packed": json.loads((way / "results.json").read_text())["perplexity"]["text"]["packed"]}


def test_export_check_and_generate(way, tmp_path, capsys, caplog):
    out = tmp_path / "onnx"
    assert cli.main(["export", str(way / "packed"), str(out)]) == 0
    assert cli.main(["check", str(out)]) == 0
    assert "left-padded" in capsys.readouterr().out
    arguments = ["generate", str(out), "--prompt", "the cat", "--max_new_tokens", "5", "--threads", "1"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert "tokens/s" in caplog.text


def test_help_and_wrong_usage(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert [c for c in cli.COMMANDS if f"\n  {c} " not in overview] == []
    assert cli.main([]) == 2
    assert cli.main(["fitt"]) == 2
    assert "unknown command 'fitt'" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    function = cli.COMMANDS[command].load()
    if not cli.COMMANDS[command].raw:
        names = inspect.signature(function).parameters
        assert [n for n in names if not re.search(rf"^ +(?:--{n}\b.*|{n})\s+[^-\s]", text, re.MULTILINE)] == []


def test_nothing_heavy_is_imported_before_a_command_is_known():
    script = (
        "import sys; from lit_binq.cli import main; main.overview(); print({'torch', 'lightning'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.tuning.epochs", "-3"], ["tuning.epochs", "-3"]),
        (["--model.end_to_end.epochs", "-3"], ["end_to_end.epochs", "-3"]),
        (
            ["--trainer.max_epochs", "1000"],
            ["trainer.max_epochs", "`model.tuning.epochs`", "`model.end_to_end.epochs`"],
        ),
        (["--model.drop_tensors", "['(']"], ["drop_tensors", "'('"]),
        (["--model.model", "./nowhere"], ["./nowhere", "no such file"]),
        (["--data.train", '{"path": "nowhere.txt"}'], ["nowhere.txt", "no such file"]),
        (["--data.window_length", "5000000"], ["too short", "window_length"]),
        (["--trainer.strategy", "fsdp"], ["trainer.strategy", "fsdp", "expected `auto` or `ddp`"]),
        (["--model.streams.batch_windows", "0"], ["batch_windows", "at least 1"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--ckpt_path", __file__], ["test_cli.py", "no checkpoint"]),
        (["--data.window_length", "200"], ["200", "128 positions", "data.window_length"]),
        (["--trainer.precision", "bf16-true"], ["trainer.precision", "bf16-mixed"]),
        (["--model.tuning", '{"epochs": 1, "lr_codes": 0, "lr_scales": 0, "lr_norms": 0}'], ["every learning rate 0"]),
    ],
)
def test_bad_options_of_fit_are_one_line_and_leave_nothing(arguments, words, way, tmp_path, capsys):
    packed = tmp_path / "packed"
    base = ["fit", "--config", str(way / "config.yaml"), "--model.packed", str(packed)]
    assert cli.main([*base, "--checkpoint.dirpath", str(tmp_path / "ckpt"), *arguments]) == 1
    line = one_line(capsys)
    assert line.startswith("litbinq fit: error: ")
    assert [w for w in words if w not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_is_no_text_is_one_line(tmp_path, capsys):
    (tmp_path / "fit.yaml").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["fit", "--config", str(tmp_path / "fit.yaml")]) == 1
    line = one_line(capsys)
    assert line.startswith("litbinq fit: error: config: not UTF-8")


def test_a_fit_that_lightning_ends_early_is_no_success(way, tmp_path, capsys):
    base = ["fit", "--config", str(way / "config.yaml"), "--checkpoint.dirpath", str(tmp_path / "ckpt")]
    results = tmp_path / "results.json"
    packed = tmp_path / "packed"
    shutil.copytree(way / "packed", packed)  # an older result must not be taken for this run's
    places = ["--model.packed", str(packed), "--results", str(results)]
    assert cli.main([*base, *places, "--trainer.max_steps", "1"]) == 1
    assert "the fit ended after" in one_line(capsys)
    assert not results.exists()


def test_a_folder_with_other_files_is_refused_before_the_fit(way, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["fit", "--config", str(way / "config.yaml"), "--model.packed", str(tmp_path)]) == 1
    assert "holds other files" in one_line(capsys)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_validate_takes_no_checkpoint(way, capsys):
    checkpoint = str(way / "checkpoint" / "last.ckpt")
    assert cli.main(["validate", "--config", str(way / "config.yaml"), "--ckpt_path", checkpoint]) == 1
    assert "model.packed" in one_line(capsys)


def test_unknown_options_exit_with_2(way, capsys):
    for extra in (["--model.foo", "1"], ["--data.take", "some"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["fit", "--config", str(way / "config.yaml"), *extra])
        assert stop.value.code == 2
        line = one_line(capsys)
        assert line.startswith("litbinq fit: error: ")
        assert "litbinq fit --help" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "packed", "out", "--head_bits", "5"], ["litbinq export: error: ", "head_bits", "5"]),
        (["export", "packed"], ["litbinq export: error: ", "out"]),
        (["generate", "out", "--nope", "1"], ["litbinq generate: error: ", "--nope"]),
        (["check"], ["litbinq check: error: ", "out"]),
        (["fit"], ["litbinq fit: error: ", "model.model", "litbinq fit --help"]),
        (["validate", "--nope"], ["litbinq validate: error: ", "--nope", "litbinq validate --help"]),
        (["report"], ["litbinq report: error: ", "run"]),
        (["compare"], ["litbinq compare: error: ", "config"]),
        (["bench", "decode", "out", "--tokens", "x"], ["litbinq bench decode: error: ", "tokens", "x"]),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    line = one_line(capsys)
    assert [w for w in words if w not in line] == []
    assert line.startswith(words[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, way, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(way / "model", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code = cli.main(
        ["fit", "--config", str(way / "config.yaml"), "--model.model", str(broken)]
        + ["--model.packed", str(tmp_path / "packed"), "--checkpoint.dirpath", str(tmp_path / "ckpt")]
    )
    assert code == 1
    assert "model.layers.1.mlp.up_proj.weight" in one_line(capsys)
    assert not (tmp_path / "packed").exists()


def damage(packed: Path, how: str) -> None:
    weights = packed / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "not packed":
        (packed / "lit_binq.json").unlink()
    elif how == "wrong shape":
        tensors = load_file(weights)
        name = next(n for n in tensors if n.endswith("codes"))
        save_file(tensors | {name: torch.zeros(1, 1, dtype=torch.uint8)}, weights)


@pytest.mark.parametrize("how", ["truncated", "no weights", "not packed", "wrong shape"])
@pytest.mark.parametrize("command", ["export", "validate"])
def test_a_damaged_packed_folder_is_one_line(command, how, way, tmp_path, capsys):
    packed = tmp_path / "packed"
    shutil.copytree(way / "packed", packed)
    damage(packed, how)
    out = tmp_path / "out"
    config = ["--config", str(way / "config.yaml"), "--model.packed", str(packed)]
    assert cli.main(["export", str(packed), str(out)] if command == "export" else ["validate", *config]) == 1
    assert f"litbinq {command}: error: " in one_line(capsys)
    assert not out.exists()


def test_generate_needs_an_exported_folder(tmp_path, way, capsys):
    for folder in (tmp_path / "nowhere", way / "packed"):
        assert cli.main(["generate", str(folder)]) == 1
        assert "litbinq generate: error: " in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["fit", "--model.finish.epochs", "2"], "`model.end_to_end` now"),
        (["fit", "--model.rest_dtype", "float16"], "`model.unquantized_dtype` now"),
        (["fit", "--data.train.style", "lower"], "`normalization` now"),
        (["fit", "--model.closed_form.amp", "true"], "OutputAlignment"),
        (["fit", "--config", "{old}"], "`model.end_to_end` now"),
        (["report", "run", "--beside", "other"], "`--baselines` now"),
        (["bench", "decode", "out", "--stock", "false"], "`--unmodified` now"),
    ],
)
def test_an_older_name_of_an_option_is_answered_by_the_new_one(words, now, tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("model: {model: x, finish: {epochs: 2}}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main([word.format(old=tmp_path / "old.yaml") for word in words])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert now in err
    assert err.count("\n") == 1
