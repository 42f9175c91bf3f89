"""The demo's summary: what it takes from two fits, and its table."""

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from exporting import export, packed_model
from native import require_native

from lit_binq.errors import LitBinqError
from lit_binq.hub import save_packed
from lit_binq.summary import STOCK_WINDOWS, onnx_perplexities, summarize, table, torch_text
from lit_binq_onnx.perplexity import onnx_perplexity
from lit_binq_onnx.session import OnnxModel

FIGURES = {
    "model": "folder/model.gguf",
    "true_bits": 3.138,
    "file_bits": 6.1,
    "calibration_tokens": 8192,
    "calibration_seconds": 200.0,
    "evaluation": "wikipedia, 24 windows of 256 tokens",
    "ppl_fp": 26.0,
    "ppl_torch": 45.0,
    "ppl_onnx": 45.045,
    "ppl_onnx_exact": 45.0,
    "ppl_onnx_exact_few": 44.0,
    "ppl_onnx_stock_few": 44.0,
    "threads": 2,
    "tokens_per_second_onnx": 100.0,
    "tokens_per_second_torch_fp32": 17.0,
    "onnx_megabytes": 100.0,
    "text": "The history of the city",
}


def test_text_is_greedy(tmp_path: Path) -> None:
    """As step by step with the packed model itself."""
    model, tokenizer = packed_model("llama"), byte_tokenizer()
    save_packed(model, tokenizer, tmp_path / "packed", facts={})
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch_text(str(tmp_path / "packed"), "ab", 5) == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)


@pytest.mark.parametrize("extra", [0, 3])
def test_perplexities_in_two_parts_are_those_of_the_whole(extra: int, tmp_path: Path) -> None:
    require_native()
    export("llama", tmp_path / "onnx")
    windows = torch.randint(0, 256, (STOCK_WINDOWS + extra, 17), generator=torch.Generator().manual_seed(0))
    ppl = onnx_perplexities(tmp_path / "onnx", windows)
    lut, exact = (OnnxModel(tmp_path / "onnx", native=True, mode=mode) for mode in ("lut", "exact"))
    assert ppl["onnx"] == pytest.approx(onnx_perplexity(lut, windows).ppl, rel=1e-9)
    assert ppl["onnx_exact"] == pytest.approx(onnx_perplexity(exact, windows).ppl, rel=1e-6)
    assert ppl["onnx_exact_few"] == pytest.approx(onnx_perplexity(exact, windows[:STOCK_WINDOWS]).ppl, rel=1e-6)
    assert ppl["onnx_stock_few"] == pytest.approx(ppl["onnx_exact_few"], rel=1e-4)
    assert ppl["onnx"] != ppl["onnx_exact"]
    assert (ppl["onnx_exact"] == ppl["onnx_exact_few"]) == (extra == 0)


def test_a_fit_beside_has_its_own_lines() -> None:
    beside = {"true_bits": 1.046, "ppl_torch": 600.5, "calibration_seconds": 250.0, "text": "The history 2000"}
    alone, both = table(dict(FIGURES)), table({**FIGURES, "beside": beside})
    assert "45.05 (+1.0e-03)" in alone
    assert "beside" not in alone
    assert "| beside it, 1.046 bits, torch | 600.50 |" in both
    assert both.endswith("With 1.046 bits: 'The history 2000'")


def test_fits_that_left_no_results_are_named(tmp_path: Path) -> None:
    recipe = tmp_path / "fit.yaml"
    recipe.write_text(json.dumps({"results": str(tmp_path / "fit.json"), "model": {}}), encoding="utf-8")
    with pytest.raises(LitBinqError, match=r"summary: no such file .*fit\.json.*run it first"):
        summarize(str(recipe), "onnx", "summary.json")
