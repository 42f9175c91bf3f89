"""The demo's summary: what it takes from two fits, and its table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from exporting import export, packed_model
from native import require_native

from lit_binq import summary
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


def recipe(folder: Path, results: str | None, changes: dict[str, Any] | None = None) -> str:
    """A fit's YAML file; its results file holds `results`, if any."""
    path = folder / "fit.yaml"
    options = {
        "results": str(folder / "fit.json"),
        "model": {"model": "none", "packed": "none"},
        "data": {"evaluation": {"wiki": {"path": "wiki.txt"}}},
    }
    path.write_text(json.dumps(options | (changes or {})), encoding="utf-8")
    if results is not None:
        (folder / "fit.json").write_text(results, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("results", "changes", "match"),
    [
        (None, {}, r"fit\.json.* cannot be read .*litbinq fit --config .*fit\.yaml.*run it first"),
        ("{", {}, r"fit\.json.* is damaged .*run the fit again"),
        ("[]", {}, r"fit\.json.* is no result"),
        ("{}", {}, r"fit\.json.* is no result"),
        ('{"perplexity": {"wiki": {"packed": 2.0}}}', {}, "did not measure 'fp' on 'wiki'.*compare_fp"),
        ('{"perplexity": {"c4": {"packed": 2.0, "fp": 1.0}}}', {}, "did not measure 'fp' on 'wiki'.*data.evaluation"),
        ("{}", {"results": None}, "lacks 'results'"),
        ("{}", {"data": {}}, r"lacks 'data\.evaluation'"),
    ],
)
def test_fits_that_left_nothing_to_summarize_are_named(
    results: str | None, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(LitBinqError, match=match) as caught:
        summarize(recipe(tmp_path, results, changes), "onnx", "summary.json")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("none.yaml", "bad.yaml", "."):
        with pytest.raises(LitBinqError, match=r"expected a YAML file|not YAML"):
            summarize(str(tmp_path / name), "onnx", "summary.json")


def test_an_infinite_perplexity_is_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit's results have null for it; the table says inf, and the summary is JSON again."""
    figures = {k: v for k, v in FIGURES.items() if k not in ("ppl_fp", "ppl_torch", "text")}
    results = json.dumps(figures | {"perplexity": {"wiki": {"fp": 2.5, "packed": None}}})
    path = recipe(tmp_path, results)
    monkeypatch.setattr(summary, "evaluation_windows", lambda *_: {"wiki": torch.zeros(2, 3)})
    monkeypatch.setattr(
        summary, "onnx_perplexities", lambda *_: {k[4:]: v for k, v in FIGURES.items() if k.startswith("ppl_onnx")}
    )
    monkeypatch.setattr(summary, "onnx_tokens_per_second", lambda *_: (1.0, " is long"))
    monkeypatch.setattr(summary, "torch_tokens_per_second", lambda *_: 1.0)
    monkeypatch.setattr(summary, "torch_text", lambda *_: " is short")
    summarize(path, str(tmp_path), str(tmp_path / "summary.json"), beside=path)
    shown = capsys.readouterr().out
    assert "| - packed, torch | inf |" in shown
    assert "bits, torch | inf |" in shown
    assert "| - full precision, torch | 2.50 |" in shown
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (written["ppl_fp"], written["ppl_torch"], written["beside"]["ppl_torch"]) == (2.5, None, None)
