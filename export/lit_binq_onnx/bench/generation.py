"""`litbinq bench decode` and `prefill`: tokens a second of a model in several programs, in one run.

Every candidate has a process of its own, in which its load time, its first token and its memory are measured; the
processes then take turns with short bursts of the same work (`bench_timing.alternate`), each timed inside its process.
All read the same token numbers. A decoding burst always starts at the end of the same context, so that attention costs
the same in all of them; a prefill burst reads the context into an empty cache.

Legend: n tokens of context.
"""

import importlib.util
import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_binq.errors import LitBinqError
from lit_binq_onnx.bench.engines import Setting
from lit_binq_onnx.bench.memory import MemoryReader, buffer_bytes, cache_bytes
from lit_binq_onnx.bench.timing import Spread, alternate
from lit_binq_onnx.bench.worker import Worker, WorkerFailed
from lit_binq_onnx.runtime.library import HOW_TO_BUILD, library_path
from lit_binq_onnx.runtime.session import read_facts

log = logging.getLogger(__name__)

PAUSE = 0.05
"""Seconds before each burst: idle threads of the process before (OpenMP's, ONNX Runtime's) stop spinning within it."""

Job = Literal["decode", "prefill"]
Status = Literal["measured", "not installed", "not given", "failed"]


@dataclass
class Record:
    """One candidate; `--json` writes a list of these.

    Attributes:
        kernel: the candidate's name.
        job: "decode" or "prefill".
        source: folder or file it read.
        context: n.
        burst: tokens of one timed burst.
        threads: of arithmetic.
        status: "measured", or why not: "not installed", "not given", "failed".
        note: how to get what is missing, or what failed.
        tokens_per_s: the median of the bursts.
        tokens_per_s_low, tokens_per_s_high: quartiles.
        ratio: tokens_per_s of the first candidate over this one's.
        ratio_low, ratio_high: quartiles of that ratio taken round by round.
        rounds: bursts.
        import_seconds: importing the program.
        load_seconds: opening the model, without that; the files are in the system's cache or not, as they were.
        first_token_seconds: the first context of the process, read to its first token.
        rss_loaded_bytes: resident memory after loading.
        rss_bytes: resident memory after the bursts.
        anon_bytes: how much of that no file is behind: neither weights that are mapped nor programs.
        mapped_bytes: how much of it are pages of files, which the system takes where it needs the memory.
        peak_bytes: the most resident memory of the process.
        file_bytes: the model's files.
        gbytes_per_s: of our own exports in decoding: weights read if a token reads the data file once, but
            of an embedding of its own one row, GB/s.
        read_gbytes_per_s: rate at which memory was read in the same rounds, median.
    """

    kernel: str
    job: Job
    source: str
    context: int
    burst: int
    threads: int
    status: Status = "measured"
    note: str = ""
    tokens_per_s: float | None = None
    tokens_per_s_low: float | None = None
    tokens_per_s_high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    import_seconds: float | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    rss_loaded_bytes: int | None = None
    rss_bytes: int | None = None
    anon_bytes: int | None = None
    mapped_bytes: int | None = None
    peak_bytes: int | None = None
    file_bytes: int | None = None
    gbytes_per_s: float | None = None
    read_gbytes_per_s: float | None = None


@dataclass(frozen=True)
class Sources:
    """What to compare.

    Attributes:
        out: the exported folder; the first candidate.
        baselines: other exported folders.
        unmodified: whether `out` runs without the native library too.
        source: the full-precision model for eager torch: hub id, folder or .gguf file; None: not given.
        genai: folder for onnxruntime-genai; None: not given.
        gguf: file for llama.cpp; None: not given.
    """

    out: str
    baselines: list[str] = field(default_factory=list)
    unmodified: bool = True
    source: str | None = None
    genai: str | None = None
    gguf: str | None = None


@dataclass(frozen=True)
class Entry:
    """A candidate.

    Attributes:
        name: what it is called.
        engine: a key of `lit_binq_onnx.bench.engines.ENGINES`.
        source: what that opens.
        status: "measured", or why it cannot run.
        note: how to get what is missing.
        token_bytes: what a token reads, where that is known.
    """

    name: str
    engine: str
    source: str
    status: Status = "measured"
    note: str = ""
    token_bytes: int | None = None


def _entries(sources: Sources) -> list[Entry]:
    """All candidates, those included that cannot run."""
    missing = None if library_path() is not None else HOW_TO_BUILD

    def ours(name: str, folder: str) -> Entry:
        if missing:
            return Entry(name, "native", folder, "not installed", missing)
        facts = read_facts(folder)
        return Entry(name, "native", folder, token_bytes=facts.get("token_bytes", facts.get("data_bytes")))

    def other(name: str, engine: str, given: str | None, option: str, module: str = "", package: str = "") -> Entry:
        if module and importlib.util.find_spec(module) is None:
            return Entry(name, engine, given or "", "not installed", f"`pip install {package}`")
        if given is None:
            return Entry(name, engine, "", "not given", option)
        return Entry(name, engine, given)

    entries = [ours("lit-binq", sources.out)]
    entries += [ours(f"lit-binq {Path(folder).name}", folder) for folder in sources.baselines]
    if sources.unmodified:
        entries.append(Entry("lit-binq file, unmodified ONNX Runtime", "unmodified", sources.out))
    genai = ("onnxruntime_genai", "onnxruntime-genai")
    llama = ("llama_cpp", "llama-cpp-python")
    entries.append(other("torch eager float32", "torch", sources.source, "`--source MODEL`, the full-precision model"))
    entries.append(other("onnxruntime-genai", "genai", sources.genai, "`--genai FOLDER` of its model builder", *genai))
    entries.append(other("llama.cpp", "llama", sources.gguf, "`--gguf FILE`", *llama))
    return entries


def _file_bytes(source: str) -> int | None:
    """Bytes of a file, or of a folder's files with weights and graphs; None for a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return None
    return sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".data", ".onnx", ".safetensors", ".bin"))


def _refuse(sources: Sources, context: int, burst: int, rounds: int, threads: int) -> dict[str, Any]:
    """The facts of the first export, after checking all options."""
    require_numbers(context=context, tokens=burst, rounds=rounds, threads=threads)
    facts = read_facts(sources.out)
    for folder in sources.baselines:
        read_facts(folder)
    for option, given, what in (("genai", sources.genai, "folder"), ("gguf", sources.gguf, "file")):
        path = Path(given).expanduser() if given is not None else None
        if path is not None and not (path.is_dir() if what == "folder" else path.is_file()):
            raise LitBinqError(f"{option}: got {given!r}, expected a {what} that exists: correct `--{option}`")
    limit = facts.get("max_positions")
    if limit is not None and context + burst > limit:
        raise LitBinqError(
            f"context and tokens: got {context} + {burst}, expected at most the model's {limit} positions"
        )
    return facts


def require_numbers(*, threads: int, **numbers: int) -> None:
    """Refuse numbers below 1, by their options' names; more threads than there are processors are a warning."""
    for name, value in (*numbers.items(), ("threads", threads)):
        if value < 1:
            raise LitBinqError(f"{name}: got {value}, expected a number from 1")
    processors = os.cpu_count() or 1
    if threads > processors:
        log.warning("threads: %d on %d processors: they will wait for each other", threads, processors)


def token_numbers(folder: str, n: int) -> list[int]:
    """n random token numbers that the exported model has, always the same ones."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise LitBinqError(f"exported folder {folder!r}: config.json has no vocab_size, expected one: export again")
    return [int(i) for i in np.random.default_rng(0).integers(0, size, n)]


class _Runner:
    """A candidate while it runs: its process, its record, and its turn."""

    def __init__(self, entry: Entry, record: Record, ids: list[int]) -> None:
        self.record, self._ids = record, ids
        capacity = len(ids) + (record.burst if record.job == "decode" else 0) + 1
        self.worker = Worker(Setting(entry.engine, entry.source, record.threads, capacity))
        try:
            started = self.worker.started
            record.import_seconds, record.load_seconds = started["import_seconds"], started["load_seconds"]
            record.rss_loaded_bytes = started["rss"]
            record.first_token_seconds = self.worker.ask(do="prefill", ids=ids)["seconds"]
        except BaseException:
            self.worker.close()
            raise

    def turn(self) -> float:
        """One burst: its seconds, as the process timed them; NaN once it has failed."""
        if self.record.status == "failed":
            return float("nan")
        try:
            if self.record.job == "decode":
                answer = self.worker.ask(do="decode", steps=self.record.burst)
            else:
                answer = self.worker.ask(do="prefill", ids=self._ids)
        except WorkerFailed as error:
            self.record.status, self.record.note = "failed", str(error)
            return float("nan")
        self.record.rss_bytes, self.record.peak_bytes = answer["rss"], answer["peak"]
        self.record.anon_bytes, self.record.mapped_bytes = answer["anon"], answer["mapped"]
        return float(answer["seconds"])


def _fill(record: Record, seconds: list[float], first: list[float] | None, read: float, data_bytes: int | None) -> None:
    """Write a candidate's bursts into its record. first: those of the candidate that all are compared with."""
    record.rounds = len(seconds)
    rate = Spread.of_rates(record.burst, seconds)
    record.tokens_per_s, record.tokens_per_s_low, record.tokens_per_s_high = rate.median, rate.low, rate.high
    record.read_gbytes_per_s = read
    if first is not None:
        ratio = Spread.of([mine / reference for mine, reference in zip(seconds, first, strict=True)])
        record.ratio = statistics.median(seconds) / statistics.median(first)
        record.ratio_low, record.ratio_high = ratio.low, ratio.high
    if data_bytes is not None and record.job == "decode":
        record.gbytes_per_s = data_bytes * rate.median / 1e9


def bench_generation(
    sources: Sources, job: Job, *, context: int, burst: int, rounds: int, threads: int
) -> list[Record]:
    """Time all candidates.

    Args:
        sources: what to compare.
        job: "decode" or "prefill".
        context: n.
        burst: tokens decoded in a burst; for a prefill it is n.
        rounds: bursts of each candidate; one more before them is not counted.
        threads: of arithmetic.

    Returns:
        A record for each candidate, those that are missing or failed included; our own is the first.

    Raises:
        LitBinqError: an option out of its range, a folder or file that is not there, or our own export fails.
    """
    _refuse(sources, context, burst if job == "decode" else 1, rounds, threads)
    ids = token_numbers(sources.out, context)
    return time_entries(_entries(sources), job, ids, burst=burst, rounds=rounds, threads=threads)


def time_entries(
    entries: Sequence[Entry], job: Job, ids: list[int], *, burst: int, rounds: int, threads: int
) -> list[Record]:
    """Time candidates; the first is what the others are compared with.

    Args:
        entries: at least one.
        job: "decode" or "prefill".
        ids: the context's n tokens.
        burst: as for `bench_generation`.
        rounds: as there.
        threads: as there.

    Returns:
        A record for each entry.

    Raises:
        LitBinqError: the first fails.
    """
    context, first = len(ids), entries[0].source
    records: list[Record] = []
    runners: dict[int, _Runner] = {}
    with ExitStack() as stack:
        for number, entry in enumerate(entries):
            record = Record(
                entry.name, job, entry.source, context, burst if job == "decode" else context, threads,
                entry.status, entry.note, file_bytes=_file_bytes(entry.source) if entry.source else None,
            )  # fmt: skip
            records.append(record)
            if entry.status != "measured":
                log.info("bench %s: %s %s: %s", job, entry.name, entry.status, entry.note)
                continue
            log.info("bench %s: opening %s", job, entry.name)
            try:
                runners[number] = _Runner(entry, record, ids)
            except WorkerFailed as error:
                if number == 0:
                    raise LitBinqError(f"bench {job}: {first!r} fails ({error})") from error
                record.status, record.note = "failed", str(error)
            else:
                stack.callback(runners[number].worker.close)
        reader = MemoryReader(threads, buffer_bytes(cache_bytes(threads)[0]))
        stack.callback(reader.close)
        turns: dict[int, Callable[[], Any]] = {number: runner.turn for number, runner in runners.items()}
        turns[-1] = reader.read
        seconds = alternate(turns, rounds=rounds, pause=PAUSE)
    read = reader.size / statistics.median(seconds.pop(-1)) / 1e9
    if records[0].status == "failed":
        raise LitBinqError(f"bench {job}: {first!r} fails ({records[0].note})")
    for number in runners:
        record = records[number]
        if record.status == "measured":
            _fill(record, seconds[number], seconds.get(0), read, entries[number].token_bytes)
    return records
