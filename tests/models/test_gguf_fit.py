"""A fit of a GGUF file: its head is read once, and the packed folder's tokenizer is the one calibrated with."""

from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from fitting import fit
from gguf_cases import write_gguf
from lit_binq.models import gguf_files
from lit_binq.models.load import load_tokenizer


def test_a_fit_reads_the_file_once(make_model, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.gguf"
    write_gguf(make_model("llama"), path, "smollm")
    reads: list[str] = []
    parse, init = gguf_files._parse, gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf_files, "_parse", lambda data: reads.append("ours") or parse(data))
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *a, **k: reads.append("gguf") or init(*a, **k))
    fit(path, text_file, tmp_path / "packed")
    assert reads == ["ours"]
    stored, own = AutoTokenizer.from_pretrained(tmp_path / "packed"), load_tokenizer(str(path))
    assert stored.backend_tokenizer.to_str() == own.backend_tokenizer.to_str()
    assert stored.special_tokens_map == own.special_tokens_map
