"""Writing files and folders whole or not at all: under a temporary name beside the target, then renamed.

A link stays a link: what it points to is written. A mounted folder, or one whose parent must not be changed, cannot be
renamed, so what is in it is replaced file by file, the manifest last; until then `.litbinq.part` in it says that it is
ours and not whole.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_binq.errors import LitBinqError, first_line
from lit_binq.utils import stopping

PART = ".litbinq.part"
"""How names begin inside a folder that is being written."""

SUFFIX = "00000000.old"
"""As long as what temporary names have behind the target's name."""

_REPORTED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO", "ENAMETOOLONG", "ESTALE", "EMFILE")
}


def reason(error: BaseException) -> str | None:
    """Why a place cannot be written, if an error says so, also where a library wrapped it in a type of its own."""
    code = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # libraries in Rust
        code = int(found[1])
    return os.strerror(code) if code is not None and code in _REPORTED else None


class UnwritableError(LitBinqError):
    """A place that cannot be written to.

    Args:
        target: the place.
        why: what the system says.
        expected: `a folder` or `a file`.
    """

    def __init__(self, target: Path, why: str | None, expected: str) -> None:
        super().__init__(f"output {str(target)!r}: cannot be written ({why}); expected {expected} in a writable place")


@contextmanager
def new_folder(target: Path, manifest: str = "") -> Iterator[Path]:
    """A temporary folder beside `target`: takes its name if the body succeeds, vanishes if it fails.

    A folder that stood at `target` is replaced; who calls decides whether it may be. Files in it that its manifest does
    not name stay.

    Args:
        target: the folder; a link to one stays a link.
        manifest: a JSON file of the folder that makes it whole; gets the key `files`, the names of all of them.

    Raises:
        UnwritableError: the place cannot be written to.
    """
    real = Path(os.path.realpath(target))
    made = [p for p in real.parents if not p.exists()]
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        work = _make_work(real)
    except OSError as error:
        _remove_empty(made)
        raise UnwritableError(target, error.strerror, "a folder") from error
    lock = os.open(work, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network file system has locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        work.chmod(0o755)  # mkdtemp's 0700 would stay with the finished folder
        yield work
        if manifest:
            _list_files(work, manifest)
        _sync(work)
        with stopping.whole():
            _publish(work, real, manifest)
    except Exception as error:
        read = isinstance(error, OSError) and not str(error.filename or work).startswith((str(work), str(real)))
        if read or isinstance(error, LitBinqError) or (why := reason(error)) is None:
            raise
        raise UnwritableError(target, why, "a folder") from error
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, that were made for something that did not come."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _make_work(real: Path) -> Path:
    """The temporary folder: beside the target if that may be renamed, inside it otherwise."""
    _sweep(real)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{real.name}.", dir=real.parent))
    except OSError:
        if not real.is_dir():
            raise
        return Path(tempfile.mkdtemp(prefix=f"{PART}-", dir=real))
    if real.is_dir():
        probe = real / f"{PART}-{work.name[-8:]}"
        try:
            work.rename(probe)  # fails across mounts, also between two mounts of one disk
            probe.rename(work)
        except OSError:
            work.rmdir()
            return Path(tempfile.mkdtemp(prefix=f"{PART}-", dir=real))
    return work


def _sweep(real: Path) -> None:
    """Remove what writers to this target left behind that were killed: nobody holds the lock on it."""
    name = re.compile(rf"\.{re.escape(real.name)}\.[a-z0-9_]{{8}}(\.old)?")
    left = []
    with suppress(OSError):
        left = [p for p in real.parent.iterdir() if name.fullmatch(p.name)]
        for old in (p for p in left if p.suffix == ".old" and not real.exists()):
            old.rename(real)  # killed between two renames: the older folder is still the valid one
        left += [p for p in real.iterdir() if p.name.startswith(f"{PART}-")] if real.is_dir() else []
    for folder in left:
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _list_files(work: Path, manifest: str) -> None:
    value = json.loads((work / manifest).read_text(encoding="utf-8"))
    value["files"] = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
    (work / manifest).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _ours(folder: Path, manifest: str) -> list[str] | None:
    """Files that the manifest of an older folder names; None if it names none."""
    try:
        files = json.loads((folder / manifest).read_text(encoding="utf-8"))["files"] if manifest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in files] if isinstance(files, list) else None


def _sync(folder: Path) -> None:
    """Have everything in a folder on the disk before a name says that it is."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                with suppress(OSError):  # some file systems refuse it for folders
                    os.fsync(handle)
            finally:
                os.close(handle)


def _publish(work: Path, real: Path, manifest: str) -> None:
    """Put the finished folder in place."""
    if work.parent == real:
        return _publish_inside(work, real, manifest)
    if not real.exists():
        work.rename(real)
        return None
    old = work.with_name(f"{work.name}.old")
    try:
        real.rename(old)
    except OSError:  # in a folder like /tmp, only its owner may
        return _publish_inside(work, real, manifest)
    try:
        work.rename(real)
    except BaseException:
        old.rename(real)
        raise
    listed = _ours(old, manifest)
    for name in (p.name for p in old.iterdir()) if listed is not None else ():
        if not (real / name).exists() and not any(f == name or f.startswith(f"{name}/") for f in listed or ()):
            (old / name).rename(real / name)
    shutil.rmtree(old, ignore_errors=True)
    return None


def _publish_inside(work: Path, real: Path, manifest: str) -> None:
    """The same for a folder that cannot be renamed."""
    mark = real / PART
    mark.touch()
    listed = _ours(real, manifest) or []
    if manifest:
        (real / manifest).unlink(missing_ok=True)
    for name in listed:
        (real / name).unlink(missing_ok=True)
    for path in sorted(work.iterdir(), key=lambda p: p.name == manifest):
        place = real / path.name
        if path.is_dir() and place.is_dir():
            shutil.rmtree(place)
        path.rename(place)
    mark.unlink()


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
    """Write a file; the folders above it are made. A link stays a link, and a device or a pipe is written to.

    Raises:
        UnwritableError: the place cannot be written to.
    """
    real = Path(os.path.realpath(path))
    try:
        if real.exists() and not real.is_file() and not real.is_dir():
            with real.open("wb") as device:
                device.write(data)
            return
        real.parent.mkdir(parents=True, exist_ok=True)
        with replacing(real) as part:
            part.write_bytes(data)
    except OSError as error:
        raise UnwritableError(path, error.strerror, "a file") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under: takes its place, on the disk, if the body succeeds.

    Raises:
        OSError: it cannot be put in place.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
