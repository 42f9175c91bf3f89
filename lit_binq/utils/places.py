"""Places that a command will write to, asked before it begins: a fit of hours must not end at a full or locked disk.

Each is tried by making something beside what will be written, of a name as long, and taking it away again: permission
bits do not tell of read-only file systems, quotas or names too long.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import PART, SUFFIX

Kind = Literal["folder", "file", "parent"]


@dataclass(frozen=True)
class Place:
    """Something that will be written.

    Attributes:
        option: its name in errors, such as `model.packed`.
        path: where.
        kind: `folder` takes the place of what is there, `file` is a JSON file, `parent` is a folder that files are put
            into beside others.
        manifest: of a folder, the file that tells an older one of ours.
    """

    option: str
    path: Path
    kind: Kind
    manifest: str = ""


def require_output_places(places: Iterable[Place]) -> None:
    """Refuse places that cannot be written to, that hold what is not ours, or that are in each other's way.

    Leaves nothing behind. What it refuses is what `files.new_folder` and `files.write_bytes` would fail at.

    Raises:
        LitBinqError: one line; names the option.
    """
    asked = list(places)
    for place in asked:
        _require_kind(place)
        _require_writable(place)
    for folder in (p for p in asked if p.kind == "folder"):
        target = Path(os.path.realpath(folder.path))
        for other in (p for p in asked if p is not folder):
            path = Path(os.path.realpath(other.path))
            if path == target or (other.kind != "file" and target in path.parents):
                raise LitBinqError(
                    f"{other.option}: {str(other.path)!r} is inside the folder of {folder.option}, which is replaced "
                    "as a whole; expected a place outside it"
                )


def require_folder(path: Path, option: str, manifest: str) -> None:
    """`require_output_places` of one folder that is replaced if it is an older one of ours."""
    require_output_places([Place(option, path, "folder", manifest)])


def free_bytes(path: Path) -> int:
    """Bytes that may still be written at a place, there or not yet there."""
    return shutil.disk_usage(_existing(Path(os.path.realpath(path)))).free


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def _require_kind(place: Place) -> None:
    """Refuse what stands at the place if it is not ours or of another kind."""
    path, where = place.path, f"{place.option}: {str(place.path)!r}"
    try:
        broken = next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)
        if broken is not None:
            raise LitBinqError(
                f"{where}: {str(broken)!r} is a link to {os.readlink(broken)!r}, which is not there; expected a "
                "link to an existing folder, or none"
            )
        if not path.exists():
            return
        if place.kind == "file":
            if path.is_dir():
                raise LitBinqError(f"{where} is a folder, expected the name of a file")
            if path.is_file() and not _is_json(path):
                raise LitBinqError(f"{where} exists and is no JSON file, expected a new file's name")
            return
        if not path.is_dir():
            raise LitBinqError(f"{where}: a file of this name exists; expected a new folder's name")
        if place.kind == "folder":
            names = {p.name for p in path.iterdir()} - {"lost+found"}  # an empty disk has one
            if names and place.manifest not in names and not any(n.startswith(PART) for n in names):
                raise LitBinqError(
                    f"{where}: the folder holds other files; expected a new or empty folder, or an older one of the "
                    f"same kind, with {place.manifest} in it"
                )
    except OSError as error:
        raise LitBinqError(f"{where}: {error.strerror}; expected a place that can be read and written") from error


def _is_json(path: Path) -> bool:
    text = path.read_bytes()
    try:
        return not text or isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def _require_writable(place: Place) -> None:
    """Make and remove what a writing would make: in the folder itself if it is there, else in the nearest above."""
    path = place.path
    if place.kind == "file" and path.exists() and not path.is_file():
        return  # a device or a pipe is written to as it is
    path = Path(os.path.realpath(path))
    try:
        there = _existing(path if place.kind == "parent" or path.is_dir() else path.parent)
        if not there.is_dir():
            raise LitBinqError(
                f"{place.option}: {str(place.path)!r} cannot be written: {str(there)!r} is a file, expected a folder"
            )
        probe = Path(tempfile.mkdtemp(prefix=f"{PART}-", dir=there))
        try:
            deep = probe.joinpath(*path.relative_to(there).parts)
            deep = deep.with_name(f".{path.name}.{SUFFIX}") if deep != probe and place.kind != "parent" else deep
            deep.mkdir(parents=True, exist_ok=True)
            (deep / "probe").write_bytes(bytes(4096))  # a full disk still takes empty files
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        what = "file" if place.kind == "file" else "folder"
        raise LitBinqError(
            f"{place.option}: {str(place.path)!r} cannot be written ({error.strerror}); expected a {what} in a "
            "writable place"
        ) from error
