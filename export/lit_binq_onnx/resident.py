"""Giving memory back that a program holds only because it has just opened a model or read a prompt.

ONNX Runtime maps the data file and packs what its kernels multiply by into memory of its own. The pages that it read
for that stay resident, though nothing reads them again: of a small model as many bytes as the packed weights. So do
those of its own library that only opening a model runs, some 10 MB. A prompt leaves the embedding rows of its tokens
(the system maps 64 KiB or more around each) and holes in the heap.

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


def clean_mappings(paths: Sequence[Path], smaps: Path = Path("/proc/self/smaps")) -> list[tuple[int, int]]:
    """Address and length of every mapping in this process of these files of which no page was changed in memory.

    Args:
        paths: files, or folders for all files in them.
        smaps: the kernel's account of this process.

    Returns:
        Empty where the system gives no account.
    """
    found: list[tuple[int, int]] = []
    names = {os.path.realpath(path) for path in paths}
    folders = tuple(name + os.sep for name in names)
    current = None
    try:
        with open(smaps, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if match := _MAPPING.fullmatch(line):
                    start, stop = int(match[1], 16), int(match[2], 16)
                    wanted = match[3] in names or match[3].startswith(folders)
                    current = (start, stop - start) if wanted else None
                elif current is not None and line.startswith("Anonymous:"):  # pages that are no longer the file's
                    if line.split()[1] == "0":
                        found.append(current)
                    current = None
    except OSError:
        return []
    return found


class Pages:
    """The pages of mapped files, to be dropped when they have been read.

    Args:
        paths: files, or folders for all files in them, as they are mapped now. The mappings must outlive this object,
            and nobody may write to them; those that were written to already are left alone.

    Attributes:
        mappings: address and length of each.
    """

    def __init__(self, *paths: Path) -> None:
        self.mappings = clean_mappings(paths) if sys.platform == "linux" else []

    def release(self) -> None:
        """Drop what is resident; what is read again comes back from the system's file cache."""
        if not self.mappings:
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, length in self.mappings:
            madvise(start, length, _MADV_DONTNEED)  # advice: where it is not taken, pages stay


def trim_heap() -> None:
    """Return the holes of the C library's heap to the system, where it can (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
