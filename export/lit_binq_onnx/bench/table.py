"""Tables of the bench commands, as Markdown.

Knows records and nothing of how they were measured.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lit_binq_onnx.bench.candidate import Shape
from lit_binq_onnx.bench.generation import Record as GenerationRecord
from lit_binq_onnx.bench.ops import OpsResult
from lit_binq_onnx.bench.ops import Record as OpsRecord
from lit_binq_onnx.bench.shape import ShapeRecord

if TYPE_CHECKING:
    from lit_binq_onnx.bench.texts import TextRecord  # brings torch, which products and speeds need not

_NOTHING = "-"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    # a bar within a cell would begin another one
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def significant(value: float | None, digits: int = 3) -> str:
    """Rounded to so many digits, without exponents for what a person would write out."""
    if value is None:
        return _NOTHING
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}" if value else "0"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def spread(median: float | None, low: float | None, high: float | None) -> str:
    """ "median (low to high)"."""
    if median is None:
        return _NOTHING
    return f"{significant(median)} ({significant(low)} to {significant(high)})"


def _kernel_name(record: OpsRecord) -> str:
    return f"{record.kernel}, block {record.block}" if record.block else record.kernel


def _shape_table(shape: Shape, threads: int, records: list[OpsRecord]) -> str:
    """All candidates at a shape."""
    rows, notes = [], []
    for r in records:
        share = _NOTHING if r.share_of_read is None else f"{r.share_of_read:.0%}"
        size = _NOTHING if r.packed_bytes is None else significant(r.packed_bytes / 1e6)
        error = _NOTHING if r.error is None else f"{r.error:.1e}"
        rows.append(
            [
                _kernel_name(r),
                spread(r.ms, r.ms_low, r.ms_high),
                _NOTHING if r.ratio_to_fp32 is None else f"{r.ratio_to_fp32:.2f}",
                error,
                size,
                significant(r.gbytes_per_s),
                share,
            ]
        )
        if r.note:
            notes.append(f"- {r.kernel}: {r.note}")
    read = next((r.read_gbytes_per_s for r in records if r.read_gbytes_per_s is not None), None)
    title = f"### M = {shape.M}, {shape.K} x {shape.N}, {threads} thread{'s' if threads > 1 else ''}"
    table = markdown(
        ["kernel", "ms (quartiles)", "x fp32", "error", "MB", "GB/s", f"of the {significant(read)} GB/s read"], rows
    )
    return "\n\n".join([title, table, *(["\n".join(notes)] if notes else [])])


def _summary_table(result: OpsResult) -> str:
    """Our default kernel against the others, a line for each shape."""
    rows = []
    for M, K, N, threads in dict.fromkeys((r.M, r.K, r.N, r.threads) for r in result.records):
        found = {r.kernel: r.ms for r in result.records if (r.M, r.K, r.N, r.threads) == (M, K, N, threads)}
        ours = found.get("lit-binq-lut")
        two_bits = [ms for name in ("ort-2bit", "ort-2bit-lut") if (ms := found.get(name)) is not None]

        def faster(other: float | None, ours: float | None = ours) -> str:
            return _NOTHING if ours is None or other is None else f"{other / ours:.2f}"

        others = [found.get("ort-fp32"), found.get("ort-8bit"), found.get("ort-4bit")]
        cells = [faster(ms) for ms in (*others, min(two_bits, default=None))]
        rows.append([f"M = {M}, {K} x {N}, {threads}", significant(ours), *cells])
    header = ["shape (K x N), threads", "lit-binq-lut, ms", "x fp32", "x 8-bit", "x 4-bit", "x the better 2-bit"]
    return markdown(header, rows)


def ops_tables(result: OpsResult) -> str:
    """The report of `bench ops`: a table for each shape, then one of ratios."""
    parts = []
    for M, K, N, threads in dict.fromkeys((r.M, r.K, r.N, r.threads) for r in result.records):
        records = [r for r in result.records if (r.M, r.K, r.N, r.threads) == (M, K, N, threads)]
        parts.append(_shape_table(Shape(M, K, N), threads, records))
    parts.append("### How many times faster lit-binq-lut is\n\n" + _summary_table(result))
    copies = f"copies of every weight rotate past {result.cache / 2**20:.0f} MiB of last cache"
    reader = f"the memory reader does {significant(result.cached_read_gbytes_per_s)} GB/s within a cache"
    kernels = f"our kernels: {result.kernels}" if result.kernels else "our library is not built"
    parts.append(
        f"Medians of alternating rounds; {copies}; {reader}; {kernels}. Errors are relative to a product in float64 of "
        "the stored weights."
    )
    return "\n\n".join(parts) + "\n"


def _megabytes(size: int | None) -> str:
    return _NOTHING if size is None else f"{size / 1e6:.0f}"


_MEMORY = ("RSS loaded, MB", "RSS after, MB", "anonymous, MB", "mapped files, MB", "peak RSS, MB", "files, MB")


def _memory(r: GenerationRecord | ShapeRecord) -> tuple[int | None, ...]:
    """What `_MEMORY` names. Resident memory apart: what the process must hold, and what the system may take back."""
    return r.rss_loaded_bytes, r.rss_bytes, r.anon_bytes, r.mapped_bytes, r.peak_bytes, r.file_bytes


def generation_table(records: list[GenerationRecord]) -> str:
    """The report of `bench decode` and `bench prefill`; candidates that are missing are rows too."""
    rows = []
    for r in records:
        if r.status == "measured":
            first = _NOTHING if r.first_token_seconds is None else significant(r.first_token_seconds * 1e3)
            cells = [
                spread(r.tokens_per_s, r.tokens_per_s_low, r.tokens_per_s_high),
                _NOTHING if r.ratio is None else f"{r.ratio:.2f}",
                significant(r.load_seconds),
                first,
                *map(_megabytes, _memory(r)),
            ]
        else:
            cells = [f"{r.status}: {r.note}", *[_NOTHING] * 9]
        rows.append([r.kernel, *cells])
    first_record = records[0]
    table = markdown(
        [
            "program",
            "tokens/s (quartiles)",
            "lit-binq is faster",
            "load, s",
            "first token, ms",
            *_MEMORY,
        ],
        rows,
    )
    job = f"prefill of {first_record.context} tokens"
    if first_record.job == "decode":
        job = f"{first_record.burst} tokens decoded after {first_record.context}"
    threads = f"{first_record.threads} thread{'s' if first_record.threads > 1 else ''}"
    text = (
        f"Medians of alternating bursts: {job}, {threads}; first token: of a prompt of {first_record.context} tokens."
    )
    if first_record.gbytes_per_s is not None and first_record.read_gbytes_per_s:
        text += (
            f" A token reads the data file once at most: {significant(first_record.gbytes_per_s)} GB/s, where this "
            f"machine read {significant(first_record.read_gbytes_per_s)} GB/s in the same rounds."
        )
    return f"{table}\n\n{text}\n"


def shape_table(records: Sequence[ShapeRecord]) -> str:
    """The report of `bench shape`; the first record is ours."""
    rows, first = [], records[0]
    for r in records:
        size = (r.weight_bytes + r.cache_bytes) / 1e6
        if r.status == "measured":
            cells = [
                spread(r.tokens_per_s, r.tokens_per_s_low, r.tokens_per_s_high),
                _NOTHING if r.tokens_per_s is None else significant(1e3 / r.tokens_per_s),
                _NOTHING if r.ratio is None else spread(r.ratio, r.ratio_low, r.ratio_high),
                f"{r.true_bits:.3f}",
                significant(size),
                significant(r.gbytes_per_s),
                _NOTHING if r.share_of_read is None else f"{r.share_of_read:.0%}",
                significant(r.load_seconds),
                *map(_megabytes, _memory(r)),
            ]
        else:
            cells = [f"{r.status}: {r.note}", *[_NOTHING] * 2, f"{r.true_bits:.3f}", *[_NOTHING] * 10]
        rows.append([r.kernel, *cells])
    header = [
        "random weights",
        "tokens/s (quartiles)",
        "ms a token",
        "lit-binq is faster",
        "bits a weight",
        "MB a token",
        "GB/s",
        f"of the {significant(first.read_gbytes_per_s)} GB/s read",
        "load, s",
        *_MEMORY,
    ]
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    head = f"head of {first.head_bits} bits" if first.head_bits else "float32 head"
    job = f"{first.burst} tokens decoded after {first.context}"
    cache = significant(first.cache_bytes / 1e6)
    text = (
        f"{first.shape}: medians of {first.rounds} alternating bursts, {job}, {threads}, {head}. A token reads its "
        f"linears and head once, and {cache} MB of keys and values; at 100% of what this machine read in the same "
        "rounds there would be nothing left to gain."
    )
    return f"{markdown(header, rows)}\n\n{text}\n"


def perplexity_table(records: "Sequence[TextRecord]") -> str:
    """Models on one text; the first is what the others are compared with."""
    first = records[0].perplexity
    rows = [
        (
            r.name,
            f"{r.perplexity:.2f}",
            f"{r.perplexity / first - 1:+.2%}",
            f"{r.true_bits:.3f}",
            str(r.head_bits or "as it was"),
            _megabytes(r.data_bytes),
        )
        for r in records
    ]
    header = ("model", "perplexity", "than the first", "true bits", "head bits", "tensors, MB")
    return f"{markdown(header, rows)}\n\n{records[0].tokens} predicted tokens.\n"
