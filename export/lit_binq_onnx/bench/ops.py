"""`litbinq bench ops`: one product by many kernels, in one process and one run, each with cold weights.

The candidates (bench_contestant.py) take turns (`bench_timing.alternate`), inputs and outputs are bound to memory that
stays. Reading a large buffer takes turns with them: its rate is the physical limit in the same noise.

Before it is timed a candidate's first and last copy are compared with a product in float64. A candidate that errs
more than its arithmetic allows, or that the runtime refuses, is listed with the reason and not timed.

Legend: M rows of x, K columns, N rows of W.
"""

import gc
import itertools
import logging
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lit_binq.errors import LitBinqError
from lit_binq_onnx.bench.candidate import Candidate, NotTimed, Shape
from lit_binq_onnx.bench.memory import MemoryReader, buffer_bytes
from lit_binq_onnx.bench.operators import (
    Kernel,
    float_kernel,
    kernel_names,
    nbits_kernels,
    our_kernels,
)
from lit_binq_onnx.bench.timing import Spread, alternate
from lit_binq_onnx.runtime.library import HOW_TO_BUILD, NativeLibrary, library_path

log = logging.getLogger(__name__)

PAUSE = 0.01
"""Seconds before each run with several threads, so that the threads of the session before are asleep."""

PILOT_ROUNDS = 3


@dataclass
class Record:
    """One candidate at one shape; `--json` writes a list of these.

    Attributes:
        kernel: its name, see `bench_operators`.
        M, K, N: the shape.
        threads: of ONNX Runtime inside the operator.
        ms: of one product, the median of all rounds; None if it was not timed.
        ms_low, ms_high: quartiles.
        ratio_to_fp32: ms of fp32 MatMul over ms, both medians, with the same number of threads.
        ratio_low, ratio_high: quartiles of that ratio taken round by round.
        packed_bytes: everything stored of the weight.
        gbytes_per_s: packed_bytes over the median time.
        share_of_read: that over the rate at which memory was read in the same rounds.
        read_gbytes_per_s: that rate, the median.
        error: root mean square of the difference from float64 over that of the result.
        block: of MatMulNBits, the fastest of those tried, and of NBitsMatMul; 0 elsewhere.
        copies: layers of a session.
        rounds: how often it was timed.
        note: why it was not timed, or what was tried; empty if there is nothing to say.
    """

    kernel: str
    M: int
    K: int
    N: int
    threads: int
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    ratio_to_fp32: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    packed_bytes: int | None = None
    gbytes_per_s: float | None = None
    share_of_read: float | None = None
    read_gbytes_per_s: float | None = None
    error: float | None = None
    block: int = 0
    copies: int = 0
    rounds: int = 0
    note: str = ""


@dataclass
class OpsResult:
    """What a run gave.

    Attributes:
        records: every candidate at every shape.
        cache: bytes of last-level cache that the rotation was made for.
        cached_read_gbytes_per_s: the memory reader within a cache, see `bench_memory`.
        kernels: the set of our kernels, or "" without the library.
    """

    records: list[Record] = field(default_factory=list)
    cache: int = 0
    cached_read_gbytes_per_s: float = 0.0
    kernels: str = ""


def _fastest(family: list[Kernel], build: Callable[[Kernel], Candidate], pause: float) -> tuple[Candidate, str]:
    """The block length a runtime is fastest with, found by a short alternation of its own, and what was tried."""
    built: dict[int, Candidate] = {}
    reasons = []
    for kernel in family:
        try:
            built[kernel.block] = build(kernel)
        except NotTimed as error:
            reasons.append(f"block {kernel.block} {error}")
    if not built:
        raise NotTimed("; ".join(reasons))
    times = alternate({b: c.run for b, c in built.items()}, rounds=PILOT_ROUNDS, pause=pause)
    ms = {b: statistics.median(times[b]) / built[b].copies * 1e3 for b in built}
    best = min(ms, key=lambda b: ms[b])
    tried = ", ".join(f"block {b}: {value:.3g} ms" for b, value in ms.items())
    return built[best], "; ".join([f"tried {tried}", *reasons])


def _enter(
    shape: Shape, threads: int, cache: int, x: np.ndarray, native: bool, names: list[str] | None
) -> tuple[list[Record], list[Candidate]]:
    """The candidates at a shape with a number of threads: their records so far, and those that will be timed."""
    records: list[Record] = []
    candidates: list[Candidate] = []

    def build(kernel: Kernel) -> Candidate:
        return Candidate(kernel, shape, threads, cache, x)

    def enter(family: list[Kernel]) -> None:
        record = Record(family[0].name, shape.M, shape.K, shape.N, threads)
        try:
            if len(family) == 1:
                candidate = build(family[0])
            else:
                candidate, record.note = _fastest(family, build, PAUSE if threads > 1 else 0.0)
        except NotTimed as error:
            record.note = str(error)
        else:
            record.packed_bytes, record.copies = candidate.stored_bytes, candidate.copies
            record.error, record.block = candidate.error, candidate.kernel.block
            candidates.append(candidate)
        records.append(record)
        gc.collect()  # a session's model is large

    for family in [[float_kernel()], *nbits_kernels(shape.K)]:
        if names is None or family[0].name in names:
            enter(family)
    for kernel in our_kernels():
        if (names is not None and kernel.name not in names) or (kernel.rows is not None and kernel.rows < shape.M):
            continue
        if native:
            enter([kernel])
        else:
            records.append(Record(kernel.name, shape.M, shape.K, shape.N, threads, note=f"not built: {HOW_TO_BUILD}"))
    return records, candidates


def _fill(record: Record, candidate: Candidate, seconds: list[float], base: list[float] | None, read: float) -> None:
    """Write measured times into a record. base: seconds of one fp32 product in the same rounds."""
    each = [s / candidate.copies for s in seconds]
    spread = Spread.of([s * 1e3 for s in each])
    record.ms, record.ms_low, record.ms_high, record.rounds = spread.median, spread.low, spread.high, len(seconds)
    if base is not None:
        ratio = Spread.of([b / s for b, s in zip(base, each, strict=True)])
        record.ratio_to_fp32 = statistics.median(base) / statistics.median(each)
        record.ratio_low, record.ratio_high = ratio.low, ratio.high
    record.gbytes_per_s = candidate.stored_bytes / spread.median / 1e6
    record.read_gbytes_per_s, record.share_of_read = read, record.gbytes_per_s / read


def measure_shape(
    shape: Shape,
    threads: list[int],
    cache: int,
    rounds: int,
    readers: dict[int, MemoryReader],
    native: bool,
    names: list[str] | None,
) -> list[Record]:
    """Time candidates at one shape.

    Args:
        shape: of the product.
        threads: numbers of threads; all take turns in the same rounds.
        cache: bytes of last-level cache to rotate past.
        rounds: at least 1.
        readers: a memory reader for each number of threads.
        native: whether our library is there.
        names: of the candidates; None for all.
    """
    x = np.random.default_rng(0).standard_normal((shape.M, shape.K), np.float32)
    records: dict[int, list[Record]] = {}
    candidates: dict[tuple[str, int], Candidate] = {}
    for t in threads:
        records[t], ready = _enter(shape, t, cache, x, native, names)
        candidates.update({(c.kernel.name, t): c for c in ready})
    turns: dict[tuple[str, int], Callable[[], Any]] = {key: c.run for key, c in candidates.items()}
    turns.update({("read", t): readers[t].read for t in threads})
    seconds = alternate(turns, rounds=rounds, pause=PAUSE if max(threads) > 1 else 0.0)
    for t in threads:
        float_key = (float_kernel().name, t)
        base = None
        if float_key in candidates:
            base = [s / candidates[float_key].copies for s in seconds[float_key]]
        read = readers[t].size / statistics.median(seconds["read", t]) / 1e9
        for record in records[t]:
            key = (record.kernel, t)
            if key in candidates:
                _fill(record, candidates[key], seconds[key], base, read)
    return [record for t in threads for record in records[t]]


def bench_ops(
    shapes: list[Shape], *, threads: list[int], rounds: int, cache: int, kernels: list[str] | None = None
) -> OpsResult:
    """Time candidates at all shapes.

    Args:
        shapes: of the products.
        threads: numbers of threads inside an operator.
        rounds: runs of each candidate at M = 1; a third of them, 3 at least, at other M, whose times are long.
        cache: bytes of last-level cache to rotate past, see `bench_memory.cache_bytes`.
        kernels: names of the candidates, of `kernel_names`; None takes all.

    Raises:
        LitBinqError: an option out of its range, or an unknown name.
    """
    if unknown := [repr(name) for name in kernels or [] if name not in kernel_names()]:
        raise LitBinqError(f"kernels: got {', '.join(unknown)}, expected some of {', '.join(kernel_names())}")
    for name, values in (("threads", threads), ("rounds", [rounds]), ("cache", [cache])):
        if not values or min(values) < 1:
            raise LitBinqError(f"{name}: got {values}, expected numbers from 1")
    for shape in shapes:
        if min(shape.M, shape.K, shape.N) < 1:
            raise LitBinqError(f"shapes: got M {shape.M}, {shape.K}x{shape.N}, expected numbers from 1")
    processors = os.cpu_count() or 1
    if max(threads) > processors:
        log.warning("threads: %d on %d processors: they will wait for each other", max(threads), processors)
    native = library_path() is not None
    result = OpsResult(cache=cache, kernels=NativeLibrary().kernels() if native else "")
    readers = {t: MemoryReader(t, buffer_bytes(cache)) for t in threads}
    try:
        result.cached_read_gbytes_per_s = readers[threads[0]].cached_rate()
        for shape in shapes:
            log.info("bench ops: M %d, %dx%d", shape.M, shape.K, shape.N)
            few = rounds if shape.M == 1 else max(min(3, rounds), rounds // 3)
            result.records += measure_shape(shape, threads, cache, few, readers, native, kernels)
    finally:
        for reader in readers.values():
            reader.close()
    return result


def shapes_of(sizes: str, rows: str) -> list[Shape]:
    """Products from options: "4096x11008,576x1536" (K x N) and "1,128" (M).

    Raises:
        LitBinqError: not written like that.
    """
    try:
        pairs = [tuple(int(part) for part in size.lower().split("x")) for size in sizes.split(",")]
        numbers = [int(part) for part in rows.split(",")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
    except ValueError:
        raise LitBinqError(
            f"shapes and M: got {sizes!r} and {rows!r}, expected K x N pairs and numbers with commas between, "
            "like `--shapes 4096x11008,576x1536 --M 1,128`"
        ) from None
    return [Shape(M, K, N) for (K, N), M in itertools.product(pairs, numbers)]
