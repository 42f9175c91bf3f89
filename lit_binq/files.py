"""Writing files and folders whole or not at all: under a temporary name beside the target, then renamed.

Touches nothing but the file system; every other room may import this file.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_binq.errors import LitBinqError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`: takes its name if the body succeeds, vanishes if it fails.

    A folder that stood at `target` is replaced; who calls decides whether it may be.

    Raises:
        LitBinqError: the place cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise LitBinqError(
            f"output {str(target)!r}: cannot be written ({error.strerror}); expected a folder in a writable place"
        ) from error
    old = work.with_name(f"{work.name}.old")
    try:
        work.chmod(0o755)  # mkdtemp's 0700 would stay with the finished folder
        yield work
        if target.exists():
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def finite(value: Any) -> Any:
    """A JSON value with None for every number that is not finite: JSON knows none, Python's `Infinity` is its own."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(figures: dict[str, float | None]) -> dict[str, float]:
    """Figures as numbers again, where `finite` left None: infinite ones."""
    return {name: math.inf if value is None else value for name, value in figures.items()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, as UTF-8; a number that is not finite becomes null.

    Raises:
        LitBinqError: the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise LitBinqError(
            f"output {str(path)!r}: cannot be written ({error.strerror}); expected a file in a writable place"
        ) from error
