"""The head of a GGUF file: metadata and table of tensors, read strictly and in one pass.

    magic "GGUF" | version | number of tensors | number of keys | keys with values | tensors' table | padding | data

A vocabulary is an array of 150,000 to 260,000 strings, each with its length before it: walked over once here, where
readers that make an array object of every string take half a minute. Every count and length is compared with the bytes
that are left before anything is reserved for it, so a damaged file costs no memory. The data stays in the file.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little endian, versions 2
and 3, which differ in nothing that stands here).
"""

import mmap
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lit_binq.errors import LitBinqError

VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
"""GGML_MAX_DIMS."""

_MAGIC = b"GGUF"
_STRING, _ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)
_NUMBERS = {
    int(GGUFValueType.UINT8): "B",
    int(GGUFValueType.INT8): "b",
    int(GGUFValueType.UINT16): "H",
    int(GGUFValueType.INT16): "h",
    int(GGUFValueType.UINT32): "I",
    int(GGUFValueType.INT32): "i",
    int(GGUFValueType.FLOAT32): "f",
    int(GGUFValueType.BOOL): "?",
    int(GGUFValueType.UINT64): "Q",
    int(GGUFValueType.INT64): "q",
    int(GGUFValueType.FLOAT64): "d",
}
"""Value type -> its code in `struct`; little endian, without padding."""
_LEAST_KEY = 8 + 4 + 1
"""Bytes of a key with the shortest name and value: two lengths are never shorter."""
_LEAST_TENSOR = 8 + 4 + 4 + 8


class Value(NamedTuple):
    """A value of the metadata: its GGUF type, the type of its elements (None unless an array), and itself."""

    type: int
    element: int | None
    value: Any


class Tensor(NamedTuple):
    """An entry of the table: name, shape as NumPy has it (slowest dimension first), GGML type, place in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufHead:
    """What `read_gguf` returns; shared by all callers, so it must not be changed.

    Attributes:
        path: the file.
        version: 2 or 3.
        values: the metadata in the file's order. Strings are str, numbers int, float or bool, arrays lists of them.
        tensors: the table in the file's order.
    """

    path: Path
    version: int
    values: dict[str, Value]
    tensors: tuple[Tensor, ...]

    def get(self, key: str) -> Any:
        """The value of a key, None where the file has no such key."""
        return self.values[key].value if key in self.values else None


class _Bytes:
    """Reads forward through the file and never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.end, self.at, self.path = data, len(data), 0, path

    def refuse(self, what: str) -> NoReturn:
        # Names out of a damaged file may be anything, and of any length.
        what = "".join(c if c.isprintable() else "?" for c in what[:300])
        raise LitBinqError(
            f"GGUF file {str(self.path)!r} cannot be loaded: {what}; expected a complete little-endian file of version "
            "2 or 3: fetch or convert it again"
        )

    def unpack(self, format: str, what: str) -> tuple[Any, ...]:
        """Values of a `struct` format that stand next."""
        size = struct.calcsize(format)
        if size > self.end - self.at:
            self.refuse(f"it ends inside {what}")
        values = struct.unpack_from(format, self.data, self.at)
        self.at += size
        return values

    def bound(self, count: int, each: int, what: str) -> None:
        """Refuse a count of things of at least `each` bytes for which the rest of the file is too short."""
        if count > (self.end - self.at) // each:
            self.refuse(f"it states {count} {what}, and {self.end - self.at} bytes are left in it")

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings that stand next, in one pass."""
        self.bound(count, 8, f"strings in {what}")
        data, at, end, length = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                stop = at + 8 + length(data, at)[0]
                if stop > end:
                    break
                found.append(data[at + 8 : stop].decode())
                at = stop
        except struct.error:  # a length that the end of the file cuts off
            pass
        except UnicodeDecodeError:
            self.refuse(f"string {len(found)} of {what} is no UTF-8")
        if len(found) < count:
            self.refuse(f"it ends inside string {len(found)} of {count} in {what}")
        self.at = at
        return found

    def value(self, type: int, key: str) -> Value:
        """The value of `key` that stands next."""
        if type in _NUMBERS:
            return Value(type, None, self.unpack(f"<{_NUMBERS[type]}", f"the value of {key}")[0])
        if type == _STRING:
            return Value(type, None, self.strings(1, f"the value of {key}")[0])
        if type != _ARRAY:
            self.refuse(f"{key} has a value of the unknown type {type}")
        element, count = self.unpack("<IQ", f"the array {key}")
        if element == _STRING:
            return Value(type, element, self.strings(count, key))
        if element not in _NUMBERS:
            self.refuse(f"the array {key} has elements of type {element}, which is no string or number")
        self.bound(count, struct.calcsize(f"<{_NUMBERS[element]}"), f"elements in {key}")
        return Value(type, element, list(self.unpack(f"<{count}{_NUMBERS[element]}", f"the array {key}")))


def read_gguf(path: str | Path) -> GgufHead:
    """Read the head of a GGUF file; a file that is asked for again, and has not changed, is not read again.

    Args:
        path: the file. What was read last is kept, a few tens of MB with a large vocabulary.

    Raises:
        LitBinqError: no readable file, not GGUF, another version or byte order, or damaged: in one line, at once.
    """
    path = Path(path).resolve()
    try:
        state = path.stat()
    except OSError as error:
        raise LitBinqError(f"GGUF file {str(path)!r} cannot be loaded: {error.strerror}; check the path") from error
    return _read(path, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=1)
def _read(path: Path, _state: tuple[int, ...]) -> GgufHead:
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise LitBinqError(f"GGUF file {str(path)!r} cannot be loaded: it is empty; fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Bytes(data, path))
    except OSError as error:
        raise LitBinqError(f"GGUF file {str(path)!r} cannot be loaded: {error.strerror}; check the path") from error


def _parse(data: _Bytes) -> GgufHead:
    magic, version = data.unpack("<4sI", "its first 8 bytes")
    if magic != _MAGIC:
        data.refuse(f"it begins with {magic!r} instead of {_MAGIC!r}")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        data.refuse("it is big-endian" if swapped in VERSIONS else f"it is of version {version}")
    tensors, keys = data.unpack("<QQ", "its counts")
    data.bound(keys, _LEAST_KEY, "keys")
    values: dict[str, Value] = {}
    for _ in range(keys):
        (key,) = data.strings(1, f"the name of key {len(values)}")
        if key in values:
            data.refuse(f"key {key} stands twice")
        values[key] = data.value(data.unpack("<I", f"the type of {key}")[0], key)
    _check(data, values)
    return GgufHead(data.path, version, values, _table(data, tensors, values))


def _check(data: _Bytes, values: dict[str, Value]) -> None:
    """Refuse metadata that nothing can be made of."""
    if not isinstance(getattr(values.get("general.architecture"), "value", None), str):
        data.refuse("it names no architecture (general.architecture)")
    if (parts := values.get("split.count")) and parts.value != 1:
        data.refuse(f"it is one of {parts.value} parts of a model; join them (llama-gguf-split --merge)")


def _table(data: _Bytes, count: int, values: dict[str, Value]) -> tuple[Tensor, ...]:
    """The table that stands next, every tensor inside the file."""
    data.bound(count, _LEAST_TENSOR, "tensors")
    entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(count):
        (name,) = data.strings(1, f"the name of tensor {len(entries)}")
        if name in entries:
            data.refuse(f"tensor {name} stands twice")
        (dimensions,) = data.unpack("<I", f"the table's entry of {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            data.refuse(f"tensor {name} has {dimensions} dimensions")
        shape = data.unpack(f"<{dimensions}Q", f"the table's entry of {name}")[::-1]
        type, offset = data.unpack("<IQ", f"the table's entry of {name}")
        try:
            entries[name] = shape, GGMLQuantizationType(type), offset
        except ValueError:
            data.refuse(f"tensor {name} is of the unknown type {type}")
    alignment = values.get("general.alignment", Value(int(GGUFValueType.UINT32), None, 32))
    if alignment.type != GGUFValueType.UINT32 or alignment.value < 1 or alignment.value & (alignment.value - 1):
        data.refuse(f"general.alignment is {alignment.value}, which is no power of two")
    begin = -(-data.at // alignment.value) * alignment.value
    return tuple(_place(data, name, *entry, begin) for name, entry in entries.items())


def _place(
    data: _Bytes, name: str, shape: tuple[int, ...], type: GGMLQuantizationType, offset: int, begin: int
) -> Tensor:
    """A tensor whose bytes all stand in the file."""
    values, size = GGML_QUANT_SIZES[type]
    if 0 in shape or shape[-1] % values:
        data.refuse(f"tensor {name} of shape {shape} does not divide into blocks of {values} values ({type.name})")
    length = prod(shape) // values * size
    if length > data.end - begin - offset:
        data.refuse(f"it ends before the last byte of tensor {name}")
    return Tensor(name, shape, type, begin + offset, length)
