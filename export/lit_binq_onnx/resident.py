"""Giving memory back that a program holds only because it has just opened a model or read a prompt.

ONNX Runtime maps the data file and packs what its kernels multiply by into memory of its own. The pages that it read
for that stay resident, though nothing reads them again: of a small model as many bytes as the packed weights. So do
those of its own library that only opening a model runs. A prompt leaves the embedding rows of its tokens (the system
maps more around each) and holes in the heap.

Linux only, elsewhere nothing happens. Touches this process's memory, never a model.
"""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s*(.*)\n")

Mapping = tuple[int, int]
"""Address and length of a mapping, bytes."""


def mappings(paths: Sequence[Path], account: Path = Path("/proc/self/smaps")) -> dict[Mapping, bool]:
    """Every mapping of these files in this process, and whether a page of it was seen to be changed in memory.

    Args:
        paths: files, or folders for all files in them.
        account: the kernel's of this process; the shorter one, `maps`, says nothing of changed pages.

    Returns:
        Empty where the system gives no account.
    """
    found: dict[Mapping, bool] = {}
    names = {os.path.realpath(path) for path in paths}
    folders = tuple(name + os.sep for name in names)
    current = None
    try:
        with open(account, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if match := _MAPPING.fullmatch(line):
                    start, stop = int(match[1], 16), int(match[2], 16)
                    wanted = match[3] in names or match[3].startswith(folders)
                    current = (start, stop - start) if wanted else None
                    if current is not None:
                        found[current] = False
                elif current is not None and line.startswith("Anonymous:"):  # pages that are no longer the file's
                    found[current] = line.split()[1] != "0"
    except OSError:
        return {}
    return found


class Pages:
    """The pages of mapped files, to be dropped when they have been read.

    Args:
        paths: files, or folders for all files in them, as they are mapped now. Nobody may write to these mappings;
            those that were written to already are left alone.

    Attributes:
        mappings: address and length of each.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        found = mappings(paths) if sys.platform == "linux" else {}
        self.mappings = [mapping for mapping, changed in found.items() if not changed]

    def release(self) -> None:
        """Drop what is resident; what is read again comes back from the system's file cache."""
        if not self.mappings:
            return
        # Another session's mapping of the same file may be gone, and its addresses be somebody's memory by now.
        there = mappings(self._paths, Path("/proc/self/maps"))
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, length in self.mappings:
            if (start, length) in there:
                madvise(start, length, _MADV_DONTNEED)  # advice: where it is not taken, pages stay


def trim_heap() -> None:
    """Return the holes of the C library's heap to the system, where it can (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
