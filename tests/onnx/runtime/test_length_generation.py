"""Texts of models whose angles depend on the length: each has the logits of a single pass of transformers over it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer

from length_models import ORIGINAL, length_model, plain_copy, plain_logits
from lit_binq.errors import LitBinqError
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.perplexity import onnx_perplexity
from lit_binq_onnx.runtime.rows import start_rows
from lit_binq_onnx.runtime.session import OnnxModel


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", ["phi3-longrope", "llama-dynamic"])
def test_prompts_and_batches_beyond_the_first_angles(kind: str, tmp_path: Path) -> None:
    model = length_model(kind)
    facts = export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)
    assert facts["angles"] == {"kind": kind.split("-")[1], "limit": ORIGINAL}
    session, other = OnnxModel(tmp_path / "out", native=False), plain_copy(model)
    ids = np.random.default_rng(1).integers(0, 256, 420)
    longest = 400 if kind == "phi3-longrope" else 300

    def alone(n: int) -> np.ndarray:
        return plain_logits(other, ids[None, :n], [(0, n)])[0, -1]

    lengths = [30, longest - 1, 297]  # the last one grows over the border
    rows = start_rows(session, [ids[:n].tolist() for n in lengths], 8)
    close(rows.logits, np.stack([alone(n) for n in lengths]))
    for _ in range(6):
        rows.step([int(ids[n]) for n in lengths])
        lengths = [n + 1 for n in lengths]
        if kind == "phi3-longrope":
            close(rows.logits, np.stack([alone(n) for n in lengths]))
    rows.keep([2])
    assert rows.logits.shape == (1, 260)
    if kind == "llama-dynamic":  # keys stay as they were made, as with transformers' cache
        parts = [(0, 297), *((i, i + 1) for i in range(297, 303))]
        close(rows.logits, plain_logits(other, ids[None, :303], parts)[:, -1])

    windows = ids[None, : min(419, session.facts["max_positions"])]
    end = windows.shape[1] - 1
    logits = torch.from_numpy(plain_logits(other, windows[:, :end], [(0, end)])[0]).double()
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(windows[0, 1:])).exp()
    assert abs(onnx_perplexity(session, windows).ppl / float(expected) - 1) < 1e-5


def test_genai_reads_prompts_in_parts(tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match="target: got 'genai' with a rotary embedding of type 'longrope'"):
        export_onnx(length_model("phi3-longrope"), byte_tokenizer(), tmp_path / "out", target="genai")
