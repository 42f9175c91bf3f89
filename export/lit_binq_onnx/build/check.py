"""Is the exported model the packed torch model? Prefill, decoding with the cache, left-padded batches, every length.

Each case runs three variants where the native library is installed, else one:

    exact   native operators, float32 activations
    lut     native operators, activations rounded to int8 tables: the default for running
    unmodified   the function bodies in standard operators, no library

`exact` and `unmodified` decide whether a file is right. `lut` errs by design: torch is run with errors of that size in
every product (`check_reference.sensitivity`), and int8 tables may move the logits a few times as much. How far they do
is in the report, beside what the model itself makes of such errors. Cases that cross a length at which something
changes (`check_lengths`) run in the first variant only.

Where a model rounds its inputs, or keys and values, to a few levels, two programs that add in another order cannot
agree closely: a value that lies at a threshold falls on the other side, moves by a whole level, and others follow.
There torch is also compared with itself, its embeddings changed by a ten-millionth, and ONNX Runtime may differ as
much.

The fused graph, where there is one, is compared in the same variants but "unmodified", without padding and with a batch
instead. Where embedding and head were rounded, torch computes with the rounded ones: no bound is wider for it.

Legend: l torch's logits, l^ ONNX Runtime's, over all positions that are compared.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.errors import LitBinqError
from lit_binq.hub.save_load import load_packed
from lit_binq_onnx.build.check_reference import LUT_ERROR, Reference, Run, relative_rms, torch_reference
from lit_binq_onnx.build.head import rounded_tables, stored_values
from lit_binq_onnx.build.same_tensors import require_same_tensors
from lit_binq_onnx.runtime.cache import StaticCache
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.library import library_path
from lit_binq_onnx.runtime.session import FUSED, Mode, OnnxModel, Route, cache_arrays, fused_bodies_trusted, read_facts

log = logging.getLogger(__name__)

FLOAT_TOLERANCE = 1e-4
"""Largest |l^ - l| / max |l| where both sides compute in float32, for a model that is not very sensitive.

Float32 sums taken in another order differ by a few 1e-6 through 30 blocks. A bias left out, a position off by
one or a bit read in the wrong order changes logits by 1e-2 and more.
"""

FLOAT_ERROR = 3e-6
"""Relative error of one product in float32 with which a model's sensitivity scales the tolerance."""

LUT_TOLERANCE = 0.05
"""Smallest bound on the relative RMS error of the logits with int8 tables."""

LUT_FACTOR = 4.0
"""How many times its sensitivity a model's logits may move with int8 tables.

Measured: 0.9 to 1.1 times on random models, 1.03 times on Gemma-3-270M at one bit (0.31 for 0.30).
"""

UNRELATED = 1.0
"""Largest such bound: logits that have nothing in common differ by 1.4."""

SATURATED = 0.5
"""Sensitivity from which logits say nothing of int8 tables; the first block's keys and values then do."""

FIRST_BLOCK = 0.1
"""Largest |l^ - l| / max |l| of those, which two products have made: 0.02 as measured."""


@dataclass
class Case:
    """One comparison.

    Attributes:
        variant: "exact", "lut" or "unmodified".
        case: "prefill", "decode", "left-padded", or what crosses a length; of the fused graph with "fused" before it.
        largest: max |l^ - l| / max |l|.
        cache: the same for the keys and values, the worst tensor.
        rms: relative RMS error of the logits, each position's mean taken out.
        divergence: mean KL divergence from torch's next-token distribution, in nats.
        agreement: share of positions with the same likeliest token.
        passed: whether the variant's bound holds.
    """

    variant: str
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
            f"{self.variant:<6} {self.case:<23} {self.largest:>9.1e} {self.cache:>9.1e} {self.rms:>9.1e} "
            f"{self.divergence:>9.1e} {self.agreement:>8.1%}  {'ok' if self.passed else 'FAILED'}"
        )


@dataclass
class CheckReport:
    """All comparisons, and what was not compared.

    Attributes:
        cases: one for each variant and case.
        notes: bounds, how lengths were crossed, what was left out and why.
    """

    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{'variant':<6} {'case':<23} {'max':>9} {'cache':>9} {'rms':>9} {'KL':>9} {'top-1':>8}"
        return "\n".join([head, *(case.row() for case in self.cases), *self.notes])


def float_tolerance(reference: Reference) -> float:
    """Largest |l^ - l| / max |l| in float32."""
    return max(FLOAT_TOLERANCE, FLOAT_ERROR * reference.sensitivity / LUT_ERROR)


def lut_tolerance(reference: Reference) -> float:
    """Largest relative RMS error of the logits with int8 tables; inf where they say nothing."""
    if reference.sensitivity >= SATURATED:
        return float("inf")
    return max(LUT_TOLERANCE, min(LUT_FACTOR * reference.sensitivity, UNRELATED), reference.bound or 0.0)


def _compare(variant: str, name: str, run: Run, onnx_model: OnnxModel, reference: Reference) -> Case:
    """Run the passes in ONNX Runtime, its own cache carried from pass to pass."""
    steps = run.steps
    before = 0 if run.past is None else run.past[0].shape[2]
    past = onnx_model.empty_past(len(steps[0].ids), before + sum(step.ids.shape[1] for step in steps) if before else 0)
    if run.past is not None:
        if isinstance(past, StaticCache):
            past.fill(run.past)
        else:
            past = run.past
    ours, theirs, cache_errors = [], [], [0.0, 0.0]
    for step in steps:
        logits, past = onnx_model.forward(step.ids, step.mask, step.positions, past)
        ours.append(logits[step.compared])
        theirs.append(step.logits)
        if not step.cache:
            continue
        seen = step.mask[:, step.first :].astype(bool)
        for number, (mine, wanted) in enumerate(zip(cache_arrays(past), step.cache, strict=True)):
            # (b, heads, p, d) -> (tokens, heads, d), padding left out
            a, b = mine[:, :, step.first :].transpose(0, 2, 1, 3)[seen], wanted.transpose(0, 2, 1, 3)[seen]
            error = _relative(a, b)
            cache_errors = [max(cache_errors[0], error), max(cache_errors[1], error if number < 2 else 0.0)]
    a, b = np.concatenate(ours).astype(np.float64), np.concatenate(theirs).astype(np.float64)
    return _figures(variant, name, a, b, cache_errors, reference)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|, NaN where either holds one; 0 where nothing is compared."""
    return float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30)) if a.size else 0.0


def _figures(
    variant: str, name: str, a: np.ndarray, b: np.ndarray, cache_errors: list[float], reference: Reference
) -> Case:
    """All figures of a case.

    Args:
        variant, name: of the case.
        a, b: (positions, V) float64 logits of ONNX Runtime and torch.
        cache_errors: largest error of keys and values, of all blocks and of the first.
        reference: its bounds.
    """
    rms, largest = relative_rms(a, b), _relative(a, b)
    log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    divergence = float((np.exp(log_b) * (log_b - log_a)).sum(-1).mean())
    # comparisons with NaN are false, so a NaN fails
    if variant == "lut":
        saturated = reference.sensitivity >= SATURATED and reference.bound is None
        passed = cache_errors[1] <= FIRST_BLOCK if saturated else rms <= lut_tolerance(reference)
    elif reference.bound is not None:
        passed = rms <= reference.bound
    else:
        passed = max(largest, cache_errors[0]) <= float_tolerance(reference)
    if not np.isfinite([largest, cache_errors[0], rms]).all():
        passed = False
    agreement = float((a.argmax(-1) == b.argmax(-1)).mean())
    return Case(variant, name, largest, cache_errors[0], rms, divergence, agreement, bool(passed))


def _ways(report: CheckReport) -> Iterator[tuple[str, bool, Mode]]:
    """(variant, native, mode) of what can be compared here."""
    if library_path() is None:
        report.notes.append("native operators not compared: the native library is not installed")
    else:
        yield "exact", True, "exact"
        yield "lut", True, "lut"
    yield "unmodified", False, "exact"


def _run_cases(
    out_dir: str | Path,
    cases: dict[str, Run],
    reference: Reference,
    variant: str,
    native: bool,
    mode: Mode,
    route: Route,
) -> list[Case]:
    """All cases in one session, which is closed then: on function bodies it holds the weights unpacked."""
    onnx_model = OnnxModel(out_dir, native=native, mode=mode, route=route)
    return [_compare(variant, name, run, onnx_model, reference) for name, run in cases.items()]


def fused_failure(out_dir: str | Path, reference: Reference) -> str | None:
    """Why a fused graph must not be used: what differs from torch in float32, or None."""
    native = library_path() is not None
    try:
        variant = "exact" if native else "unmodified"
        cases = _run_cases(out_dir, reference.fused, reference, variant, native, "exact", "fused")
    except RunError as error:  # the graph does not run at all
        return str(error)
    failed = next((case for case in cases if not case.passed), None)
    if failed is None:
        return _wrong_angles(Path(out_dir), reference)
    return f"{failed.case} differs from torch: max {failed.largest:.1e}, cache {failed.cache:.1e}"


def _wrong_angles(out_dir: Path, reference: Reference) -> str | None:
    """Which table of angles in the fused graph is not torch's, where no case reaches that far."""
    if not reference.angles:
        return None
    graph = onnx.load(out_dir / FUSED, load_external_data=False).graph
    stored = {t.name: stored_values(t, out_dir) for t in graph.initializer if t.name in reference.angles}
    wrong = [n for n, table in reference.angles.items() if n not in stored or not np.array_equal(stored[n], table)]
    return f"its table of {wrong[0]} is not the model's" if wrong else None


def check_onnx(
    out_dir: str | Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    packed: str | Path | None = None,
    reference: Reference | None = None,
) -> CheckReport:
    """Compare an exported folder with the packed folder's tensors and with the packed torch model it was made from.

    Args:
        out_dir: what `export_onnx` wrote.
        model: the packed model; None loads it from its packed folder.
        tokenizer: its tokenizer, to compare on text rather than on random tokens.
        packed: the packed folder, where `model` is None and it is not where it was at the export.
        reference: what torch computes, where that is known; `model` is not needed then, and tensors were compared.

    Returns:
        All figures; `str()` makes a table of them.

    Raises:
        LitBinqError: a comparison failed (the message names it), the packed folder cannot be read.
        RunError: the exported folder cannot be read or run.
    """
    facts = read_facts(out_dir)
    report = CheckReport()
    if reference is None:
        if model is None:
            packed = _source(Path(out_dir), facts.get("packed"), packed)
            model, tokenizer = load_packed(packed)
            report.notes.append(require_same_tensors(Path(out_dir), packed, model))
        bits = facts.get("head_bits", 0)
        # What a text has been asked about is not rounded again, but read.
        tables = Path(out_dir) if bits == 4 else None
        with rounded_tables(model, bits, block=facts.get("head_block"), stored=tables):
            reference = torch_reference(model, tokenizer, fused=bool(facts.get("fused")))
    if reference.bound is not None:
        report.notes.append(
            f"every variant within rms <= {reference.bound:.2g}: inputs, or keys and values, have few levels"
        )
    report.notes += reference.notes
    variants = list(_ways(report))
    fused = reference.fused if facts.get("fused") else {}
    routes: tuple[tuple[Route, dict[str, Run]], ...] = (("generic", reference.generic), ("fused", fused))
    for route, cases in routes:
        short = {name: run for name, run in cases.items() if name not in reference.lengths}
        for number, (variant, native, mode) in enumerate(variants if route == "generic" else variants[:2]):
            if not cases or (route == "fused" and not _runs_fused(native, report)):
                continue
            report.cases += _run_cases(out_dir, short if number else cases, reference, variant, native, mode, route)
    if fused and (wrong := _wrong_angles(Path(out_dir), reference)) is not None:
        raise LitBinqError(f"check: the fused graph is damaged: {wrong}; export again")
    _tell_lut(report, reference)
    _require_passed(report, reference, bool(packed))
    return report


def _runs_fused(native: bool, report: CheckReport) -> bool:
    """Whether this ONNX Runtime may run the fused graph."""
    if native or fused_bodies_trusted():
        return True
    note = "the fused graph was not compared: this ONNX Runtime is not asked to run its function bodies"
    if note not in report.notes:
        report.notes.append(note)
    return False


def _tell_lut(report: CheckReport, reference: Reference) -> None:
    """What int8 tables do, beside what the model makes of errors of that size."""
    moved = [case.rms for case in report.cases if case.variant == "lut"]
    if not moved:
        return
    bound = lut_tolerance(reference)
    report.notes.append(
        f"lut: int8 tables move the logits by rms {max(moved):.1e} at most; errors of {LUT_ERROR:.1%} in every product "
        f"move torch's by {reference.sensitivity:.1e} ("
        + (f"bound {bound:.1e})" if np.isfinite(bound) else "so sensitive that only its first block is judged)")
    )


def _require_passed(report: CheckReport, reference: Reference, compared: bool) -> None:
    """Raise for the first failed case. compared: the tensors were found to be the packed folder's."""
    failed = [case for case in report.cases if not case.passed]
    if not failed:
        return
    worst = next((case for case in failed if case.variant != "lut"), failed[0])
    figures = f"max {worst.largest:.1e}, cache {worst.cache:.1e}, rms {worst.rms:.1e}"
    count = f"({len(failed)} of {len(report.cases)} cases failed)"
    if worst.variant == "lut":
        raise LitBinqError(
            f"check: {worst.case} (lut) differs from torch: {figures}, expected rms <= {lut_tolerance(reference):.2g}, "
            f"{LUT_FACTOR:g} times what errors of that size do to this model {count}: in float32 the file is right, so "
            "it is the native library's int8 kernels on this machine: build the library again, or use `--mode exact`"
        )
    bound = f"max and cache <= {float_tolerance(reference):.1e}"
    if reference.bound is not None:
        bound = f"rms <= {reference.bound:.2g}"
    advice = "the file is damaged or belongs to another packed folder; export again, or correct `--packed`"
    if compared:
        advice = "its tensors are the packed folder's, so it is the graph or this ONNX Runtime: export again here"
    raise LitBinqError(
        f"check: {worst.case} ({worst.variant}) differs from torch: {figures}, expected {bound} {count}: {advice}"
    )


def _source(out_dir: Path, recorded: str | None, given: str | Path | None) -> Path:
    """The packed folder an export was made from."""
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
    return folder
