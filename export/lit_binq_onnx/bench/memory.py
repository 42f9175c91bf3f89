"""This machine's memory: the size of its last cache, and how fast it reads what is in no cache.

The read bandwidth is the physical limit of decoding: a token must read every weight once. Any reader that computes
may measure its arithmetic instead: a float sum is a chain of dependent additions, a copy also writes. The reader here
is the C library's `memchr` looking for a byte that is not there: a load and a compare for each vector, no result to
keep, nothing written. How fast it is within a cache is reported too: where that is no faster than from memory, the
reader was the limit and not the memory.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lit_binq.errors import LitBinqError

UNKNOWN_CACHE = 64 << 20
"""Taken for the last cache where the system does not say, bytes."""

LARGEST_BUFFER = 1 << 30

_SYSTEM = Path("/sys/devices/system/cpu")


def _list_of_cpus(text: str) -> set[int]:
    """The kernel's notation "0-3,8" as numbers."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _linux_cache(threads: int, system: Path) -> int | None:
    """Bytes of last-level cache that this many threads can reach, or None where the kernel does not say."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    instances: dict[tuple[int, frozenset[int]], int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        for index in sorted(system.glob("cpu[0-9]*/cache/index[0-9]*")):
            if (index / "type").read_text().strip() == "Instruction":
                continue
            shared = frozenset(_list_of_cpus((index / "shared_cpu_list").read_text()))
            if allowed is not None and not shared & allowed:
                continue
            size = (index / "size").read_text().strip()
            level = int((index / "level").read_text())
            instances[level, shared] = int(size.rstrip("KMG")) * units.get(size[-1], 1)
    except (OSError, ValueError):
        return None
    if not instances:
        return None
    last = max(level for level, _ in instances)
    sizes = sorted((size for (level, _), size in instances.items() if level == last), reverse=True)
    return sum(sizes[: max(1, threads)])


def _mac_cache() -> int | None:
    for key in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):
        found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()
        if found.isdigit() and int(found):
            return int(found)
    return None


def cache_bytes(threads: int = 1, *, system: Path = _SYSTEM) -> tuple[int, bool]:
    """Last-level cache that this many threads can reach.

    Where cores have last caches of their own, as many of them count as there are threads.

    Args:
        threads: 1 or more.
        system: where the kernel describes processors.

    Returns:
        Bytes, and whether the system said so; `UNKNOWN_CACHE` where it does not.
    """
    found = _mac_cache() if sys.platform == "darwin" else _linux_cache(threads, system)
    return (UNKNOWN_CACHE, False) if found is None else (found, True)


class MemoryReader:
    """Reads a buffer larger than every cache with several threads, once a call; `close` ends its threads.

    Args:
        threads: each reads a part of its own.
        size: bytes of the buffer.

    Raises:
        LitBinqError: there is no C library to be called.
    """

    _CACHED = 128 << 10
    """Bytes for the in-cache figure: a part of any second-level cache."""

    def __init__(self, threads: int, size: int) -> None:
        try:
            self._find = ctypes.CDLL(None).memchr
        except (OSError, TypeError, AttributeError) as error:
            raise LitBinqError(f"read bandwidth: no memchr in the C library ({error}), expected one") from error
        self._find.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._find.restype = ctypes.c_void_p
        self.threads, self.size = threads, size
        # Written, not only asked for: pages that were never written are all the same page of zeros.
        self._buffer = np.ones(size, np.uint8)
        self._pool = ThreadPoolExecutor(threads)
        edges = np.linspace(0, size, threads + 1).astype(np.int64).tolist()
        start = self._buffer.ctypes.data
        self._parts = [(start + a, b - a) for a, b in itertools.pairwise(edges)]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _read_part(self, address: int, length: int, times: int = 1) -> None:
        for _ in range(times):  # ctypes lets the other threads run meanwhile
            if self._find(address, 0, length) is not None:
                raise AssertionError("the buffer holds no zero")

    def read(self) -> None:
        """Read every byte of the buffer once."""
        if self.threads == 1:
            self._read_part(*self._parts[0])
            return
        for done in [self._pool.submit(self._read_part, *part) for part in self._parts]:
            done.result()

    def cached_rate(self, times: int = 20, bursts: int = 10) -> float:
        """GB/s of the same reader on one thread within a cache: the best of some bursts, what it could do."""
        length = min(self._CACHED, self.size)
        self._read_part(self._parts[0][0], length)
        seconds = []
        for _ in range(bursts):
            began = time.perf_counter()
            self._read_part(self._parts[0][0], length, times)
            seconds.append(time.perf_counter() - began)
        return times * length / min(seconds) / 1e9


def buffer_bytes(cache: int) -> int:
    """A buffer of which no useful part stays in a cache of this size: four times as large, 1 GiB at most."""
    return min(LARGEST_BUFFER, max(64 << 20, 4 * cache))
