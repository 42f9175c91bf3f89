"""The demo's summary: what it takes from two fits, and its table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer

from exporting import export, packed_model
from lit_binq.data.module import CalibrationData
from lit_binq.data.text import TextSource
from lit_binq.demo import summary
from lit_binq.demo.summary import STOCK_WINDOWS, onnx_perplexities, summarize, table, torch_text
from lit_binq.errors import LitBinqError
from lit_binq.hub.save_load import save_packed
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime import session
from lit_binq_onnx.runtime.perplexity import onnx_perplexity
from lit_binq_onnx.runtime.session import OnnxModel, read_facts
from native import require_native

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


@pytest.mark.parametrize("penalty", [1.0, 9.0])
def test_text_is_greedy(penalty: float, tmp_path: Path) -> None:
    """As step by step with the packed model itself, whatever its generation settings ask for."""
    model, tokenizer = packed_model("llama"), byte_tokenizer()
    model.generation_config.repetition_penalty = penalty
    save_packed(model, tokenizer, tmp_path / "packed", facts={})
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch_text(str(tmp_path / "packed"), "ab", 5) == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)


@pytest.mark.slow
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
    baseline = {"true_bits": 1.046, "ppl_torch": 600.5, "calibration_seconds": 250.0, "text": "The history 2000"}
    alone, both = table(dict(FIGURES)), table({**FIGURES, "baseline": baseline})
    assert "45.05 (+1.0e-03)" in alone
    assert "baseline" not in alone
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
    data = "calibration: c; fingerprint ab\nevaluation: wiki; fingerprint cd"
    results = json.dumps(figures | {"perplexity": {"wiki": {"fp": 2.5, "packed": None}}, "data": data})
    path = recipe(tmp_path, results)
    monkeypatch.setattr(summary, "evaluation_windows", lambda *_: ({"wiki": torch.zeros(2, 3)}, "cd"))
    monkeypatch.setattr(summary, "_require_export_of", lambda *_: None)
    monkeypatch.setattr(
        summary, "onnx_perplexities", lambda *_: {k[4:]: v for k, v in FIGURES.items() if k.startswith("ppl_onnx")}
    )
    monkeypatch.setattr(summary, "onnx_tokens_per_second", lambda *_: (1.0, " is long"))
    monkeypatch.setattr(summary, "torch_tokens_per_second", lambda *_: 1.0)
    monkeypatch.setattr(summary, "torch_text", lambda *_: " is short")
    summarize(path, str(tmp_path), str(tmp_path / "summary.json"), baseline=path)
    shown = capsys.readouterr().out
    assert "| - packed, torch | inf |" in shown
    assert "bits, torch | inf |" in shown
    assert "| - full precision, torch | 2.50 |" in shown
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (written["ppl_fp"], written["ppl_torch"], written["baseline"]["ppl_torch"]) == (2.5, None, None)


class Measured(Exception):
    """All checks are passed: the first measurement would begin."""


@pytest.fixture
def run(tmp_path: Path, text_file: Path, make_source: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fit's recipe and results, and an export of what it wrote; the fit itself is left out."""

    def stop(*_: Any) -> None:
        raise Measured

    monkeypatch.setattr(summary, "onnx_perplexities", stop)
    source, packed, text = make_source("llama"), tmp_path / "packed", tmp_path / "wiki.txt"
    text.write_bytes(text_file.read_bytes())
    model, tokenizer = packed_model("llama"), byte_tokenizer()
    save_packed(model, tokenizer, packed, facts={})
    export_onnx(model, tokenizer, tmp_path / "onnx", check=False, fused="off", packed=packed)
    data = CalibrationData(str(source), evaluation={"wiki": TextSource(str(text))}, eval_windows=3, eval_length=16)
    data.setup("validate")
    return {
        "text": text,
        "options": {
            "model": {"model": str(source), "packed": str(packed)},
            "data": {"evaluation": {"wiki": {"path": str(text)}}, "eval_windows": 3, "eval_length": 16},
        },
        "results": {
            "true_bits": read_facts(tmp_path / "onnx")["true_bits"],
            "perplexity": {"wiki": {"fp": 2.0, "packed": 3.0}},
            "data": data.describe(),
            "calibration_seconds": 1.0,
        },
    }


def summarized(run: dict[str, Any], folder: Path, baseline: dict[str, Any] | None = None) -> None:
    """Summarize a run, with another fit's results beside it."""
    places = [folder / "a", folder / "b"]
    for place in places:
        place.mkdir(exist_ok=True)
    path = recipe(places[0], json.dumps(run["results"]), run["options"])
    other = None if baseline is None else recipe(places[1], json.dumps(baseline), run["options"])
    summarize(path, str(folder / "onnx"), str(folder / "summary.json"), other)


@pytest.mark.slow
def test_a_run_of_one_piece_is_measured(run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Measured):
        summarized(run, tmp_path, run["results"])


@pytest.mark.slow
def test_other_windows_than_the_fits_are_refused(run: dict[str, Any], tmp_path: Path) -> None:
    """Perplexities of the fit would stand beside those of another text, or of more of it."""
    older = {**run["results"], "data": run["results"]["data"].replace("fingerprint ", "fingerprint 0")}
    with pytest.raises(LitBinqError, match=r"b/fit\.yaml' was evaluated on windows with the fingerprint 0"):
        summarized(run, tmp_path, older)
    with pytest.raises(LitBinqError, match="fingerprint none"):
        summarized({**run, "results": {**run["results"], "data": ""}}, tmp_path)
    longer = {**run["options"], "data": {**run["options"]["data"], "eval_windows": 4}}
    with pytest.raises(LitBinqError, match=r"a/fit\.yaml' was evaluated on windows with the fingerprint"):
        summarized({**run, "options": longer}, tmp_path)
    run["text"].write_text(run["text"].read_text().replace("cat", "cow"))
    with pytest.raises(LitBinqError, match=r"has changed since: run the fit again") as caught:
        summarized(run, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_export_of_another_fit_is_refused(run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match=r"true bits, and the fit of .* reported 9\.000000"):
        summarized({**run, "results": {**run["results"], "true_bits": 9.0}}, tmp_path)
    moved = {**run["options"], "model": {**run["options"]["model"], "packed": str(tmp_path / "elsewhere")}}
    with pytest.raises(LitBinqError, match=r"was exported from .*packed', and the fit of .* wrote .*elsewhere"):
        summarized({**run, "options": moved}, tmp_path)


@pytest.mark.slow
def test_speeds_are_taken_with_the_threads_the_table_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_native()
    export("llama", tmp_path / "onnx")
    byte_tokenizer().save_pretrained(tmp_path / "onnx")
    given: list[Any] = []
    real = session.OnnxModel.__init__
    monkeypatch.setattr(session.OnnxModel, "__init__", lambda *a, **k: given.append(k.get("threads")) or real(*a, **k))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    summary.onnx_tokens_per_second(tmp_path / "onnx", "ab", 3)
    assert given == [1]


def test_the_source_is_the_fits_own_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, **options: Any) -> None:
        raise LitBinqError(f"{source} {sorted(options.items())}")

    monkeypatch.setattr(summary, "load_model", load)
    options = {"model": "owner/name", "revision": "v2", "drop_tensors": ["x"]}
    with pytest.raises(LitBinqError, match=r"owner/name \[\('drop_tensors', \['x'\]\), \('revision', 'v2'\)\]"):
        summary.torch_tokens_per_second(options, "ab", 1)
