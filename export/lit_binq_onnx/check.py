"""Is the exported model the packed torch model? Prefill, decoding with the cache, and left-padded batches.

Each case runs three ways where the native library is installed, else one:

    exact   native operators, float32 activations
    lut     native operators, activations rounded to int8 tables: the default for running
    stock   the function bodies in standard operators, no library

Where a model rounds its inputs, or keys and values, to a few levels, two programs that add in another order cannot
agree closely: a value that lies at a threshold falls on the other side, moves by a whole level, and others follow.
There torch is also compared with itself, its embeddings changed by a ten-millionth, and ONNX Runtime may differ as
much.

The fused graph, where there is one, is compared in the same ways but "stock", without padding and with a batch instead.
Where embedding and head were rounded, torch computes with the rounded ones: no bound is wider for it.

Legend: l torch's logits, l^ ONNX Runtime's, over all positions that are not padding.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.bits import activation_bits
from lit_binq.errors import LitBinqError
from lit_binq.hub import load_packed
from lit_binq.kv_cache import kv_bits
from lit_binq_onnx.head import rounded_tables
from lit_binq_onnx.library import library_path
from lit_binq_onnx.session import Mode, OnnxModel, Route, cache_arrays, positions, read_facts
from lit_binq_onnx.trace import flat_cache

log = logging.getLogger(__name__)

FLOAT_TOLERANCE = 1e-4
"""Largest |l^ - l| / max |l| where both sides compute in float32.

Float32 sums taken in another order differ by a few 1e-6 through 30 blocks. A bias left out, a position off by
one or a bit read in the wrong order changes logits by 1e-2 and more.
"""

LUT_TOLERANCE = 0.2
"""Largest relative RMS error of the logits, |l^ - l - mean| / |l - mean|, with int8 tables.

One multiplication errs by about 0.7% and the errors of all linears add up as noise: 0.01 measured on random
models of 2 blocks, 0.02 of 30. Nothing in common with torch would be 1.4. How good the mode is the figures of
the report tell; this bound tells that it works.
"""

ROUNDED_FACTOR = 3.0
"""How many times the relative RMS error of torch against itself a model with rounded inputs may have.

Measured on SmolLM2-135M with inputs of 4 bits: torch against itself 0.21, ONNX Runtime against torch 0.22.
"""

DECODE_STEPS = 4
_TEXT = "The export is right when both programs continue this sentence in the same way, token by token."


@dataclass
class Case:
    """One comparison.

    Attributes:
        way: "exact", "lut" or "stock".
        case: "prefill", "decode" or "left-padded"; of the fused graph "fused prefill", "fused decode" or "fused batch".
        largest: max |l^ - l| / max |l|.
        cache: the same for the keys and values, the worst tensor.
        rms: relative RMS error of the logits, each position's mean taken out.
        divergence: mean KL divergence from torch's next-token distribution, in nats.
        agreement: share of positions with the same likeliest token.
        passed: whether the way's bound holds.
    """

    way: str
    case: str
    largest: float
    cache: float
    rms: float
    divergence: float
    agreement: float
    passed: bool

    def row(self) -> str:
        """One line of the report."""
        return (
            f"{self.way:<6} {self.case:<13} {self.largest:>9.1e} {self.cache:>9.1e} {self.rms:>9.1e} "
            f"{self.divergence:>9.1e} {self.agreement:>8.1%}  {'ok' if self.passed else 'FAILED'}"
        )


@dataclass
class CheckReport:
    """All comparisons, and what was not compared.

    Attributes:
        cases: one for each way and case.
        notes: what was left out and why.
    """

    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{'way':<6} {'case':<13} {'max':>9} {'cache':>9} {'rms':>9} {'KL':>9} {'top-1':>8}"
        return "\n".join([head, *(case.row() for case in self.cases), *self.notes])


@dataclass
class _Step:
    """One pass of torch: what went in and what came out; `valid` (b, s) is false at padding."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    logits: np.ndarray
    cache: list[np.ndarray]
    valid: np.ndarray


@dataclass
class Reference:
    """What torch computes in every case; see `torch_reference`.

    Attributes:
        generic, fused: by case of the two graphs.
        bound: largest relative RMS error where the model rounds values to a few levels; None where it does not, and
            results must be equal.
    """

    generic: dict[str, list[_Step]]
    fused: dict[str, list[_Step]]
    bound: float | None = None


@torch.no_grad()
def _torch_steps(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray, decode: int) -> list[_Step]:
    """A prefill and greedy decoding steps in torch.

    Args:
        model: the packed model.
        ids: (b, n) int64.
        mask: (b, n), 0 at padding.
        decode: number of steps after the prefill.
    """
    cache, steps = DynamicCache(), []
    new = ids
    for _ in range(decode + 1):
        where = positions(mask)[:, -new.shape[1] :]
        out = model(
            input_ids=torch.from_numpy(new),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(where),
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits.float().numpy()
        kept = [t.numpy().copy() for t in flat_cache(cache)]
        steps.append(_Step(new, mask, where, logits, kept, mask[:, -new.shape[1] :].astype(bool)))
        new = logits[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
    return steps


def _prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of token numbers (2, n) int64 and a mask (2, n) that pads the first row on the left."""
    size = model.config.get_text_config(decoder=True).vocab_size
    ids: list[int] = [] if tokenizer is None else list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    if len(ids) < 8 or max(ids) >= size:
        ids = np.random.default_rng(0).integers(0, size, 24).tolist()
    ids = ids[:24]
    rows = np.array([ids, ids[::-1]], np.int64)
    mask = np.ones_like(rows)
    mask[0, : len(ids) // 3] = 0
    return rows, mask


def _compare(way: str, name: str, steps: list[_Step], onnx_model: OnnxModel, bound: float | None) -> Case:
    """Run the steps in ONNX Runtime, its own cache carried from step to step."""
    past = onnx_model.empty_past(len(steps[0].ids))
    ours, theirs, cache_error = [], [], 0.0
    for step in steps:
        logits, past = onnx_model.forward(step.ids, step.mask, step.positions, past)
        ours.append(logits[step.valid])
        theirs.append(step.logits[step.valid])
        seen = step.mask.astype(bool)
        for mine, reference in zip(cache_arrays(past), step.cache, strict=True):
            # (b, heads, p, d) -> (tokens, heads, d), padding left out
            a, b = mine.transpose(0, 2, 1, 3)[seen], reference.transpose(0, 2, 1, 3)[seen]
            cache_error = max(cache_error, _relative(a, b))
    a, b = np.concatenate(ours).astype(np.float64), np.concatenate(theirs).astype(np.float64)
    return _figures(way, name, a, b, cache_error, bound)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|, NaN where either holds one."""
    return float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))


def _figures(way: str, name: str, a: np.ndarray, b: np.ndarray, cache_error: float, bound: float | None) -> Case:
    """All figures of a case. a, b: (positions, V) float64 logits of ONNX Runtime and torch; see `Reference.bound`."""
    a_centred, b_centred = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    rms = float(np.linalg.norm(a_centred - b_centred) / max(float(np.linalg.norm(b_centred)), 1e-30))
    log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    divergence = float((np.exp(log_b) * (log_b - log_a)).sum(-1).mean())
    largest = _relative(a, b)
    # comparisons with NaN are false, so a NaN fails
    if bound is not None:
        passed = rms <= bound
    else:
        passed = rms <= LUT_TOLERANCE if way == "lut" else max(largest, cache_error) <= FLOAT_TOLERANCE
    if not np.isfinite([largest, cache_error, rms]).all():
        passed = False
    agreement = float((a.argmax(-1) == b.argmax(-1)).mean())
    return Case(way, name, largest, cache_error, rms, divergence, agreement, bool(passed))


def _ways(report: CheckReport) -> Iterator[tuple[str, bool, Mode]]:
    """(way, native, mode) of what can be compared here."""
    if library_path() is None:
        report.notes.append("native operators not compared: the native library is not installed")
    else:
        yield "exact", True, "exact"
        yield "lut", True, "lut"
    yield "stock", False, "exact"


def torch_reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, fused: bool) -> Reference:
    """Run every case in torch.

    Args:
        model: the packed model, its tables rounded where the export's are (`head.rounded_tables`).
        tokenizer: to compare on text rather than on random tokens.
        fused: whether there is a fused graph to compare.
    """
    ids, mask = _prompts(model, tokenizer)
    generic = {
        "prefill": _torch_steps(model, ids[1:], np.ones_like(ids[1:]), 0),
        "decode": _torch_steps(model, ids[1:, :5], np.ones_like(ids[1:, :5]), DECODE_STEPS),
        "left-padded": _torch_steps(model, ids, mask, 2),
    }
    bound = _rounding_bound(model, ids[1:])
    if not fused:
        return Reference(generic, {}, bound)
    batch = _torch_steps(model, ids[:, :7], np.ones_like(ids[:, :7]), 2)
    return Reference(
        generic, {"fused prefill": generic["prefill"], "fused decode": generic["decode"], "fused batch": batch}, bound
    )


@torch.no_grad()
def _rounding_bound(model: PreTrainedModel, ids: np.ndarray) -> float | None:
    """See `Reference.bound`; ids (1, n)."""
    if activation_bits(model) == 16 and not kv_bits(model):
        return None
    embedded = model.get_input_embeddings()(torch.from_numpy(ids))
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
    a, b = (model(inputs_embeds=x).logits[0].double().numpy() for x in (embedded, embedded * (1 + 1e-7 * noise)))
    return max(LUT_TOLERANCE, ROUNDED_FACTOR * _figures("exact", "torch", a, b, 0.0, None).rms)


def _run_cases(
    out_dir: str | Path,
    cases: dict[str, list[_Step]],
    bound: float | None,
    way: str,
    native: bool,
    mode: Mode,
    route: Route,
) -> list[Case]:
    """All cases in one session, which is closed then: on function bodies it holds the weights unpacked."""
    onnx_model = OnnxModel(out_dir, native=native, mode=mode, route=route)
    return [_compare(way, name, steps, onnx_model, bound) for name, steps in cases.items()]


def fused_failure(out_dir: str | Path, reference: Reference) -> str | None:
    """Why a fused graph must not be used: what differs from torch in float32, or None."""
    native = library_path() is not None
    try:
        way = "exact" if native else "stock"
        cases = _run_cases(out_dir, reference.fused, reference.bound, way, native, "exact", "fused")
    except LitBinqError as error:  # the graph does not run at all
        return str(error)
    failed = next((case for case in cases if not case.passed), None)
    if failed is None:
        return None
    return f"{failed.case} differs from torch: max {failed.largest:.1e}, cache {failed.cache:.1e}"


def check_onnx(
    out_dir: str | Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    packed: str | Path | None = None,
    reference: Reference | None = None,
) -> CheckReport:
    """Compare an exported folder with the packed torch model it was made from.

    Args:
        out_dir: what `export_onnx` wrote.
        model: the packed model; None loads it from its packed folder.
        tokenizer: its tokenizer, to compare on text rather than on random tokens.
        packed: the packed folder, where `model` is None and it is not where it was at the export.
        reference: what torch computes, where that is known; `model` is not needed then.

    Returns:
        All figures; `str()` makes a table of them.

    Raises:
        LitBinqError: a comparison failed (the message names it), the folder or its source cannot be read.
    """
    facts = read_facts(out_dir)
    if reference is None:
        if model is None:
            model, tokenizer = _load_source(Path(out_dir), facts.get("packed"), packed)
        bits = facts.get("head_bits", 0)
        # What a text has been asked about is not rounded again, but read.
        tables = Path(out_dir) if bits == 4 else None
        with rounded_tables(model, bits, block=facts.get("head_block"), stored=tables):
            reference = torch_reference(model, tokenizer, fused=bool(facts.get("fused")))
    report = CheckReport()
    if reference.bound is not None:
        report.notes.append(
            f"every way within rms <= {reference.bound:.2g}: the model rounds inputs or keys and values to few levels"
        )
    ways = list(_ways(report))
    for way, native, mode in ways:
        report.cases += _run_cases(out_dir, reference.generic, reference.bound, way, native, mode, "generic")
    for way, native, mode in ways[:2] if facts.get("fused") else []:
        report.cases += _run_cases(out_dir, reference.fused, reference.bound, way, native, mode, "fused")
    if failed := [case for case in report.cases if not case.passed]:
        worst = failed[0]
        limit = reference.bound or (LUT_TOLERANCE if worst.way == "lut" else None)
        bound = f"max and cache <= {FLOAT_TOLERANCE}" if limit is None else f"rms <= {limit:.2g}"
        raise LitBinqError(
            f"check: {worst.case} ({worst.way}) differs from torch: max {worst.largest:.1e}, "
            f"cache {worst.cache:.1e}, rms {worst.rms:.1e}, expected {bound} "
            f"({len(failed)} of {len(report.cases)} cases failed): "
            "the file is damaged or belongs to another packed folder; export again, or correct `--packed`"
        )
    return report


def _load_source(
    out_dir: Path, recorded: str | None, given: str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packed model an export was made from."""
    if given is None and recorded is None:
        raise LitBinqError(
            f"exported folder {str(out_dir)!r}: does not say which packed folder it was made from; give `--packed`"
        )
    folder = Path(given) if given is not None else out_dir / str(recorded)
    if not folder.is_dir():
        raise LitBinqError(
            f"check: packed folder {str(folder.resolve())!r}: no such folder, expected the one this export "
            "was made from; give `--packed`"
        )
    return load_packed(folder)
