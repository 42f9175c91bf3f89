"""`litbinq bench perplexity`: exported models on a text, beside each other."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer

from exporting import packed_model
from lit_binq.cli import main as cli
from lit_binq.data.text import TextSource, encode, make_windows, read_text
from lit_binq_onnx.build.export import export_onnx

MODELS = {"one": "llama", "two": "qwen2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Exports of two models, `one` and `two`."""
    root = tmp_path_factory.mktemp("exports")
    for name, kind in MODELS.items():
        export_onnx(packed_model(kind), byte_tokenizer(), root / name, check=False, fused="off")
    return [root / "one", root / "two"]


@pytest.mark.slow
def test_perplexities_are_those_of_torch(folders: list[Path], text_file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "figures.json"
    words = ["--baselines", str(folders[1]), str(text_file), "--windows", "3", "--length", "16"]
    assert cli.main(["bench", "perplexity", str(folders[0]), *words, "--mode", "exact", "--json", str(out)]) == 0
    windows = make_windows(encode(byte_tokenizer(), read_text(TextSource(str(text_file)))), 16, 3)
    records = json.loads(out.read_text())
    assert [r["name"] for r in records] == ["one", "two"]
    for kind, record in zip(MODELS.values(), records, strict=True):
        model = packed_model(kind).eval()
        with torch.no_grad():
            logits = model(windows).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert record["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-4)
        assert record["tokens"] == 3 * 15
    table = capsys.readouterr().out
    assert f"| two | {records[1]['perplexity']:.2f} |" in table
    assert "| one | " in table
    assert "+0.00%" in table


def test_folders_of_one_name_are_told_apart(folders: list[Path], text_file: Path, tmp_path: Path, capsys) -> None:
    """Runs keep their exports in folders of the same name."""
    named = [tmp_path / run / "onnx" for run in ("a", "b")]
    for folder, link in zip(folders, named, strict=True):
        shutil.copytree(folder, link)
    words = ["--baselines", str(named[1]), str(text_file), "--windows", "1", "--length", "16"]
    assert cli.main(["bench", "perplexity", str(named[0]), *words]) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} | " in table for name in named)


def test_fewer_windows_than_asked_for_are_told(folders: list[Path], text_file: Path, tmp_path: Path, caplog) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:50])
    assert cli.main(["bench", "perplexity", str(folders[0]), str(short), "--windows", "9", "--length", "16"]) == 0
    assert "gives only 3 windows of 16 tokens instead of 9" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.txt"], "nowhere.txt"),
        (["TEXT", "--length", "1"], "length: got 1, expected 2"),
        (["TEXT", "--length", "100000"], "text too short"),
        (["TEXT", "--windows", "0"], "count 0"),
        (["TEXT", "--length", "16", "--baselines", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_give_one_line(folders: list[Path], text_file: Path, words: list[str], said: str, capsys) -> None:
    given = [str(text_file) if word == "TEXT" else word for word in words]
    assert cli.main(["bench", "perplexity", str(folders[0]), *given]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_other_tokens_are_refused(folders: list[Path], text_file: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in folders[1].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["--baselines", str(other), str(text_file), "--length", "16"]
    assert cli.main(["bench", "perplexity", str(folders[0]), *words]) == 1
    assert "tokenizes the text otherwise" in capsys.readouterr().err
