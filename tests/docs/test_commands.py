"""Every block of commands and of Python in README and guides is run.

Where a document names a model or a text, the folder it runs in has a tiny one of that name (`make_workspace`), and
commands of ours get sizes for it as their last options (`SMALLER`). `litbinq` runs in this process, which saves its
imports; Python blocks run in a fresh namespace, everything else in bash. What cannot run here stands in `CANNOT`, with
the reason.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from documents import DOCUMENTS, Block, blocks, make_workspace
from lit_binq.cli import main as cli

CANNOT = {
    "git clone": "fetches the project itself",
    "make ": "installs into .venv, fetches, or runs these tests; the target is looked up in the Makefile",
    ".venv/bin/python -m pip": "builds the project again",
    "pip install": "fetches packages; its extras are looked up in pyproject.toml",
    "--trainer.devices 2": "needs two GPUs; its options are parsed",
    "import onnxruntime_genai": "not installed here",
}
"""Beginning of a command, or a part of it: why it is not run."""

SMALLER = {
    "fit": ["--config", "tiny.yaml"],
    "validate": ["--config", "tiny.yaml"],
    "closed_form.bits": ["--model.closed_form.bits", "3.0"],  # scales of 32 columns alone take more than 1.25 bits
    "bench ops": ["--rounds", "1", "--cache_mb", "1", "--kernels", "ort-4bit,lit-binq-lut"],
    "bench decode": ["--context", "32", "--tokens", "8"],  # of the 128 positions that the tiny model has
    "bench perplexity": ["--windows", "2", "--length", "48"],
}
"""What a command of ours that holds these words gets as its last options: sizes for a tiny model."""

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

BEFORE = {"several-gpus": "litbinq fit --config configs/smollm2-135m-l.yaml"}
"""What a reader of a document has done already."""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "template"
    folder.mkdir()
    make_workspace(folder)
    return folder


@pytest.fixture
def workspace(template, tmp_path, monkeypatch):
    folder = tmp_path / "workspace"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["litbinq"])  # Lightning warns of a second command line
    monkeypatch.syspath_prepend(str(folder))  # as `python FILE` in that folder has it
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return folder


def refused(command: str) -> str | None:
    """The reason why a command is not run, or None."""
    for part, reason in CANNOT.items():
        if part in command and not (part == "import onnxruntime_genai" and find_spec("onnxruntime_genai")):
            return reason
    return None


def litbinq(words: list[str]) -> None:
    """One command of ours, in this process."""
    command = " ".join(words)
    for part, options in SMALLER.items():
        if re.search(rf"(^|[ .]){re.escape(part)}( |$)", command):
            words = [*words, *options]
    if refused(command):
        with pytest.raises(SystemExit) as stop:  # every option is known and has a value that may be
            cli.main([*words, "--print_config"])
        assert stop.value.code == 0
    else:
        assert cli.main(words) == 0, f"litbinq {command}"


def run_bash(text: str) -> None:
    """The lines of a block: ours one by one, what lies between them together."""
    others: list[str] = []

    def flush() -> None:
        script = "\n".join(others)
        others.clear()
        if script.strip():
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], check=True, timeout=300)

    for line in text.splitlines():
        if found := re.match(r"(?:\.venv/bin/)?litbinq (.*)", line):
            flush()
            litbinq(shlex.split(found[1], comments=True))
        elif found := re.match(r"export (\w+)=(.*)", line):
            os.environ[found[1]] = os.path.expandvars(found[2])
        elif refused(line):
            for target in re.findall(r"^make ([\w-]+)", line):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"
            for extra in re.findall(r"\w+", "".join(re.findall(r"^pip install.*\.\[(.*?)\]", line))):
                assert extra in EXTRAS, f"no extra {extra}"
        else:
            others.append(line)
    flush()


def run(block: Block) -> None:
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    if block.language == "bash":
        run_bash(block.text)
    elif block.language == "python" and not block.title and not refused(block.text):
        exec(compile(block.text, block.title or "<block>", "exec"), {"__name__": "__main__"})


@pytest.mark.grid(1)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_blocks_run(document, workspace, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "")  # a block may set it: put back afterwards
    if document.stem in BEFORE:
        run_bash(BEFORE[document.stem])
    found = blocks(document)
    assert found
    for block in found:
        run(block)
