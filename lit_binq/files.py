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

from lit_binq.errors import LitBinqError, first_line


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


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; the folders above it are made.

    Raises:
        LitBinqError: the place cannot be written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise LitBinqError(
            f"output {str(path)!r}: cannot be written ({error.strerror}); expected a file in a writable place"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, as UTF-8; a number that is not finite becomes null.

    Raises:
        LitBinqError: the place cannot be written to.
    """
    write_bytes(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def quoted(value: Any) -> str:
    """What a file holds, short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path, version: int | tuple[int, ...], where: str, hint: str) -> dict[str, Any]:
    """A JSON object of ours: its key `version` says which program wrote it.

    Args:
        path: the file.
        version: the one expected, or those that can be read, newest first.
        where: what the file is, for errors.
        hint: what to do about a file that cannot be read, for errors.

    Raises:
        LitBinqError: no such file, not JSON, or of another version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitBinqError(f"{where} cannot be read ({error.strerror}); {hint}") from error
    except (ValueError, RecursionError) as error:
        raise LitBinqError(f"{where} is damaged ({first_line(error)}); {hint}") from error
    found = value.get("version") if isinstance(value, dict) else None
    versions = version if isinstance(version, tuple) else (version,)
    if not isinstance(found, int) or isinstance(found, bool) or found not in versions:
        raise LitBinqError(
            f"{where}: format version {quoted(found)}, expected {' or '.join(map(str, versions))}; it was written by "
            "another version of this program"
        )
    return value
