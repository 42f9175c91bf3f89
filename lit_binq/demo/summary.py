"""The summary of a whole run: what a fit reported and what ONNX Runtime makes of it, in one JSON and one table.

Every figure is measured here or read from the fit's own results; windows are the very ones the fit was evaluated on.
"""

import gc
import json
import logging
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from lit_binq.compare.plan import get, load_yaml
from lit_binq.data.module import CalibrationData
from lit_binq.data.text import TextSource
from lit_binq.errors import LitBinqError, first_line
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.save_load import load_packed
from lit_binq.models.load import load_model, load_tokenizer
from lit_binq.utils.files import numbers, write_json

log = logging.getLogger(__name__)

PROMPT = "The history of the city begins"
NEW_TOKENS = 48
REPEATS = 3
STOCK_WINDOWS = 4
"""Evaluated without the library, where a session takes long to load, and with it for comparison."""


def evaluation_windows(options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """The evaluation windows (n, T) of a fit's options, by name, and their fingerprint."""
    data, model = options["data"], options["model"]
    sets = {name: TextSource(**source) for name, source in data["evaluation"].items()}
    chosen = {k: data[k] for k in ("eval_windows", "eval_length", "eval_batch_size") if k in data}
    module = CalibrationData(model["model"], evaluation=sets, revision=model.get("revision"), **chosen)
    module.setup("validate")
    loaders = zip(sets, module.val_dataloader(), strict=True)
    windows = {name: loader.dataset.windows for name, loader in loaders}  # type: ignore[attr-defined]  # our own data set class
    return windows, module.fingerprint("evaluation")


def _require_evaluated_on(recipe: str, results: dict[str, Any], fingerprint: str) -> None:
    """Refuse figures of other windows than those measured here: perplexities of two texts say nothing together.

    Raises:
        LitBinqError: the fit was evaluated on other windows, or does not say on which.
    """
    found = re.search(r"^evaluation: .*; fingerprint ([0-9a-f]+)$", str(results.get("data")), re.MULTILINE)
    if found is None or found[1] != fingerprint:
        raise LitBinqError(
            f"summary: the fit of {recipe!r} was evaluated on windows with the fingerprint "
            f"{found[1] if found else 'none'}, and its recipe and texts now give {fingerprint}; expected the same: a "
            "text, the recipe or the tokenizer has changed since: run the fit again"
        )


def _require_export_of(onnx: Path, recipe: str, options: dict[str, Any], results: dict[str, Any]) -> None:
    """Refuse an export of another packed folder than the fit's.

    Raises:
        RunError: no export.
        LitBinqError: one of a folder elsewhere, or one with other bits.
    """
    from lit_binq_onnx.runtime.session import read_facts

    facts = read_facts(onnx)
    ours = Path(options["model"]["packed"]).resolve()
    theirs = facts.get("packed") and (onnx / facts["packed"]).resolve()
    if theirs is not None and theirs != ours:
        raise LitBinqError(
            f"summary: {str(onnx)!r} was exported from {str(theirs)!r}, and the fit of {recipe!r} wrote {str(ours)!r}; "
            "expected an export of that: run `litbinq export` on it"
        )
    if not math.isclose(facts["true_bits"], results["true_bits"], rel_tol=1e-9):
        raise LitBinqError(
            f"summary: {str(onnx)!r} has {facts['true_bits']:.6f} true bits, and the fit of {recipe!r} reported "
            f"{results['true_bits']:.6f}; expected an export of what that fit wrote: run `litbinq export` again"
        )


@torch.no_grad()
def torch_tokens_per_second(options: dict[str, Any], prompt: str, new_tokens: int) -> float:
    """Greedy decoding steps a second of a fit's full-precision model in eager torch, float32, with its cache."""
    source, revision = options["model"], options.get("revision")
    model = load_model(source, revision=revision, drop_tensors=options.get("drop_tensors") or ())
    tokenizer = load_tokenizer(source, revision=revision)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model(input_ids=ids, use_cache=True)
    began = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return new_tokens / (time.perf_counter() - began)


def onnx_perplexities(folder: Path, windows: torch.Tensor) -> dict[str, float]:
    """Perplexities of an exported model on windows (n, T), by the way it runs.

    Keys: "onnx" and "onnx_exact", the two modes of the library; "onnx_exact_few" and "onnx_stock_few", the first
    `STOCK_WINDOWS` windows with it and without.
    """
    from lit_binq_onnx.runtime.perplexity import onnx_perplexity
    from lit_binq_onnx.runtime.session import OnnxModel

    few, rest = windows[:STOCK_WINDOWS], windows[STOCK_WINDOWS:]
    log.info("perplexity of ONNX Runtime, LUT mode")
    perplexity = {"onnx": onnx_perplexity(OnnxModel(folder, native=True, mode="lut"), windows).ppl}
    log.info("perplexity of ONNX Runtime, exact mode")
    model = OnnxModel(folder, native=True, mode="exact")
    # In two parts, of which the first is compared below: nothing is computed twice.
    parts = [onnx_perplexity(model, part) for part in (few, rest) if len(part)]
    perplexity["onnx_exact"] = math.exp(sum(p.nll for p in parts) / sum(p.tokens for p in parts))
    perplexity["onnx_exact_few"] = parts[0].ppl
    del model  # a session holds the weights; the next one unpacks them
    gc.collect()
    log.info("perplexity of ONNX Runtime without the library, on %d windows", len(few))
    perplexity["onnx_stock_few"] = onnx_perplexity(OnnxModel(folder, native=False), few).ppl
    gc.collect()
    return perplexity


def onnx_tokens_per_second(folder: Path, prompt: str, new_tokens: int) -> tuple[float, str]:
    """Median decoding steps a second with the native operators, and the text after the prompt (greedy).

    With as many threads as torch has, which is what the table says.
    """
    from lit_binq_onnx.runtime.generate import generate
    from lit_binq_onnx.runtime.session import OnnxModel
    from lit_binq_onnx.runtime.tokens import FolderTokenizer

    model = OnnxModel(folder, native=True, threads=torch.get_num_threads())
    tokenizer = FolderTokenizer(folder)
    rates, text = [], ""
    for _ in range(REPEATS):
        generation = generate(model, tokenizer, prompt, new_tokens)
        text = "".join(generation)
        rates.append(generation.stats.tokens_per_second)
    return statistics.median(rates), text


@torch.no_grad()
def torch_text(folder: str, prompt: str, new_tokens: int) -> str:
    """What a packed folder writes after a prompt, in torch (greedy)."""
    model, tokenizer = load_packed(folder)
    for name, layer in packed_linears(model).items():  # unpacked once, not at every token
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.copy_(layer.dequantize())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
        model.set_submodule(name, dense)
    ids = tokenizer(prompt, return_tensors="pt")
    # Only where it ends is the model's own: penalties and the like would make it another text than the greedy one, and
    # transformers takes them from there even if they are not given here.
    special = {k: getattr(model.generation_config, k, None) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    written: Any = GenerationMixin.generate(model, **ids, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[arg-type]  # a causal model has the mixin
    return str(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def _fitted(recipe: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a fit's YAML file and the results it wrote.

    Raises:
        LitBinqError: no such recipe, one that writes no results, or no results.
    """
    options = load_yaml(Path(recipe))
    for key in ("results", "model.model", "model.packed", "data.evaluation"):
        if not get(options, key):
            raise LitBinqError(
                f"summary: {recipe!r} lacks {key!r}, expected a recipe of `litbinq fit` with that option"
            )
    results = Path(options["results"])
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitBinqError(
            f"summary: {str(results)!r} cannot be read ({error.strerror}), expected the results of "
            f"`litbinq fit --config {recipe}`: run it first"
        ) from error
    except ValueError as error:
        raise LitBinqError(f"summary: {str(results)!r} is damaged ({first_line(error)}): run the fit again") from error
    if not isinstance(found, dict) or not isinstance(found.get("perplexity"), dict):
        raise LitBinqError(f"summary: {str(results)!r} is no result of `litbinq fit`, expected one: run the fit again")
    return options, found


def _perplexity(recipe: str, results: dict[str, Any], name: str, *wanted: str) -> list[float]:
    """Those of a fit on one evaluation set, as numbers: JSON has null for an infinite one.

    Raises:
        LitBinqError: the fit did not measure one of `wanted`.
    """
    found = numbers(results["perplexity"].get(name, {}))
    if missing := set(wanted) - found.keys():
        raise LitBinqError(
            f"summary: the fit of {recipe!r} did not measure {sorted(missing)[0]!r} on {name!r}, expected it to: see "
            "`data.evaluation` and `model.compare_fp`, and run it again"
        )
    return [found[key] for key in wanted]


def summarize(recipe: str, onnx: str, out: str, baseline: str | None = None) -> None:
    """Measure an exported run and write its summary.

    Args:
        recipe: the YAML file of the fit; its `results` file must exist.
        onnx: the exported folder.
        out: JSON file to write.
        baseline: the YAML file of another fit of the same model on the same data, whose bits, perplexity and text are
            to stand beside; nothing of it needs to be exported.

    Raises:
        LitBinqError: a fit has left no results, the evaluation sets differ, or the export is of another fit.
    """
    from lit_binq_onnx.runtime.session import DATA, FUSED, MODEL

    options, fit = _fitted(recipe)
    other = None if baseline is None else _fitted(baseline)
    name = next(iter(options["data"]["evaluation"]))
    ppl_fp, ppl_torch = _perplexity(recipe, fit, name, "fp", "packed")
    ppl_baseline = [] if other is None else _perplexity(str(baseline), other[1], name, "packed")
    _require_export_of(Path(onnx), recipe, options, fit)
    sets, fingerprint = evaluation_windows(options)
    _require_evaluated_on(recipe, fit, fingerprint)
    if other is not None:
        _require_evaluated_on(str(baseline), other[1], fingerprint)
    windows = sets[name]
    perplexity = onnx_perplexities(Path(onnx), windows)
    log.info("decoding speed")
    rate, text = onnx_tokens_per_second(Path(onnx), PROMPT, NEW_TOKENS)
    summary = {
        "model": fit["model"],
        "true_bits": fit["true_bits"],
        "file_bits": fit["file_bits"],
        "evaluation": f"{name}, {len(windows)} windows of {windows.shape[1]} tokens",
        "ppl_fp": ppl_fp,
        "ppl_torch": ppl_torch,
        **{f"ppl_{key}": value for key, value in perplexity.items()},
        "calibration_tokens": fit["calibration_tokens"],
        "calibration_seconds": fit["calibration_seconds"],
        "tokens_per_second_onnx": rate,
        "tokens_per_second_torch_fp32": torch_tokens_per_second(options["model"], PROMPT, NEW_TOKENS),
        "threads": torch.get_num_threads(),
        "onnx_megabytes": sum(f.stat().st_size for n in (MODEL, FUSED, DATA) if (f := Path(onnx) / n).is_file()) / 1e6,
        "text": PROMPT + text,
    }
    if other is not None:
        log.info("text of the baseline")
        summary["baseline"] = {
            "true_bits": other[1]["true_bits"],
            "ppl_torch": ppl_baseline[0],
            "calibration_seconds": other[1]["calibration_seconds"],
            "text": PROMPT + torch_text(other[0]["model"]["packed"], PROMPT, NEW_TOKENS),
        }
    write_json(Path(out), summary)
    print(table(summary))


def table(s: dict[str, Any]) -> str:
    """The README's table of one run, as Markdown."""

    def drift(key: str) -> str:
        return f"{s[key]:.2f} ({s[key] / s['ppl_torch'] - 1:+.1e})"

    rows = [
        ("true bits, blocks", f"{s['true_bits']:.3f}"),
        ("file bits, whole packed folder", f"{s['file_bits']:.2f}"),
        ("calibration", f"{s['calibration_tokens']} tokens, {s['calibration_seconds']:.0f} s"),
        (f"perplexity ({s['evaluation']})", ""),
        ("- full precision, torch", f"{s['ppl_fp']:.2f}"),
        ("- packed, torch", f"{s['ppl_torch']:.2f}"),
        ("- packed, ONNX Runtime, LUT mode", drift("ppl_onnx")),
        ("- packed, ONNX Runtime, exact mode", drift("ppl_onnx_exact")),
        (
            f"- the same, {STOCK_WINDOWS} windows; without the library",
            f"{s['ppl_onnx_exact_few']:.2f}; {s['ppl_onnx_stock_few']:.2f} "
            f"({s['ppl_onnx_stock_few'] / s['ppl_onnx_exact_few'] - 1:+.1e})",
        ),
        (f"decoding, ONNX Runtime, {s['threads']} threads", f"{s['tokens_per_second_onnx']:.0f} tokens/s"),
        (f"decoding, torch float32, {s['threads']} threads", f"{s['tokens_per_second_torch_fp32']:.0f} tokens/s"),
        ("ONNX files", f"{s['onnx_megabytes']:.0f} MB"),
    ]
    written = [f"It writes: {s['text']!r}"]
    if other := s.get("baseline"):
        rows.append((f"beside it, {other['true_bits']:.3f} bits, torch", f"{other['ppl_torch']:.2f}"))
        written.append(f"With {other['true_bits']:.3f} bits: {other['text']!r}")
    lines = [f"| {s['model'].rpartition('/')[2]} | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join([*lines, "", *written])
