"""Fenced blocks of Markdown files, and a folder in which those of README and guides run on a tiny model."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from conftest import ROOT, byte_tokenizer, tiny_model

from exporting import export_onnx, pack_linears
from gguf_cases import write_gguf
from lit_binq.hub.save_load import save_packed

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *GUIDES]
"""Those whose blocks are run."""

_FENCE = re.compile(r"^```(?P<language>\w+)?(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.M | re.S)

TINY = {
    "model": {"tuning": {"epochs": 1}, "end_to_end": {"epochs": 1}},
    "data": {"window_length": 48, "windows": 12, "held_out": 0.2, "batch_size": 4}
    | {"eval_windows": 2, "eval_length": 48, "eval_batch_size": 2},
    "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False},
}
"""What every fit gets as a last configuration: sizes for a tiny model, and the CPU."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is (title), its text."""

    language: str
    title: str
    text: str


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a Markdown file, in order."""
    found = _FENCE.finditer(document.read_text(encoding="utf-8"))
    return [Block(m["language"] or "", m["title"] or "", m["text"]) for m in found]


def make_workspace(folder: Path) -> None:
    """Everything that the documents name and do not make themselves.

    The recipes in configs/ are the project's own. Where they and the guides name a model, there is a random one of two
    blocks; where they name a text, there is a short one.
    """
    shutil.copytree(ROOT / "configs", folder / "configs")
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    source = folder / "runs" / "demo" / "source"
    for place in (source / "SmolLM2-135M-Instruct", folder / "models" / "mine"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    write_gguf(model, source / "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm")
    packed = pack_linears(model)
    place = folder / "runs" / "demo"
    save_packed(packed, tokenizer, place / "packed", facts={})
    export_onnx(packed, tokenizer, place / "onnx", packed=place / "packed", check=False)
    text = "".join(f"The cat number {i} sat on mat {i * 7 % 31}, and then it slept again.\n" for i in range(300))
    written = [path.read_text(encoding="utf-8") for path in [*(ROOT / "configs").iterdir(), *GUIDES]]
    named = re.findall(r"path: (data/[^,}\s]+)", "".join(written))
    for path in [*named, source / "calibration.txt", source / "evaluation.txt"]:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
