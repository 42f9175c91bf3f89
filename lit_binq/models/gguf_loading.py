"""transformers loads a GGUF file, and takes its head from `read_gguf` instead of reading it again and again.

transformers parses a file for the configuration, for the tokenizer and for the weights, partly through
`gguf.GGUFReader`, which makes three array objects of every string of the vocabulary: 10 s each time with 150,000
tokens. Here the readers it asks are exchanged, while it loads one file, for ones that answer out of a head read once;
all it makes of the answers is its own. A reader that is called otherwise than here known is left alone: slower, and
as right. The weights' bytes are dequantized by gguf, as before.
"""

import importlib
import inspect
import sys
import tempfile
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import quant_shape_to_byte_shape

from lit_binq.models.gguf_files import GgufHead, read_gguf

_LOCK = threading.RLock()
_PLAIN = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}
"""Types that NumPy has, as gguf.GGUFReader gives them; all others come as bytes."""
_METADATA_READERS = (
    "transformers.integrations.gguf",
    "transformers.integrations.gguf.reader",
    "transformers.quantizers.quantizer_gguf",
)
"""Modules through which transformers 5.2x calls its own `read_gguf_metadata`."""
_VOCABULARY = ("tokens", "merges", "scores", "token_type")
"""Long arrays under `tokenizer.ggml.`."""


class _Field(NamedTuple):
    """A field as `gguf.ReaderField` has it, its parts plain Python objects."""

    name: str
    parts: list[Any]
    data: list[int]
    types: list[GGUFValueType]


class _Tensor(NamedTuple):
    """A tensor as `gguf.ReaderTensor` has it."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: npt.NDArray[Any]
    n_elements: int
    n_bytes: int
    data_offset: int
    data: npt.NDArray[Any]


class _Reader:
    """A head with the attributes of `gguf.GGUFReader` that transformers uses."""

    def __init__(self, head: GgufHead, vocabulary: bool) -> None:
        self.fields = _fields(head, vocabulary)
        self.data = np.memmap(head.path, mode="r")
        self.tensors = [self._tensor(*tensor) for tensor in head.tensors]

    def get_field(self, key: str) -> _Field | None:
        return self.fields.get(key)

    def _tensor(self, name: str, shape: tuple[int, ...], type: GGMLQuantizationType, start: int, size: int) -> _Tensor:
        raw = self.data[start : start + size]
        data = raw.view(_PLAIN[type]) if type in _PLAIN else raw
        stored = shape if type in _PLAIN else quant_shape_to_byte_shape(shape, type)
        sizes = np.array(shape[::-1], dtype=np.uint64)
        return _Tensor(name, type, sizes, int(np.prod(shape)), size, start, data.reshape(stored))


def _fields(head: GgufHead, vocabulary: bool) -> dict[str, _Field]:
    """{key: field}: length of the key, the key, type of the value, then the value's own parts, lengths left out.

    Without `vocabulary` every token is the same empty string, only how many there are is right; merges, scores and
    types of tokens are left out.
    """
    fields = {
        f"GGUF.{name}": _Field(f"GGUF.{name}", [[number]], [0], [type])
        for name, number, type in (
            ("version", head.version, GGUFValueType.UINT32),
            ("tensor_count", len(head.tensors), GGUFValueType.UINT64),
            ("kv_count", len(head.values), GGUFValueType.UINT64),
        )
    }
    left_out = () if vocabulary else tuple(f"tokenizer.ggml.{name}" for name in _VOCABULARY)
    for key, (type, element, value) in head.values.items():
        if key in left_out[1:]:
            continue
        types = [GGUFValueType(type)]
        parts: list[Any] = [[len(key.encode())], key.encode(), [type]]
        if element is not None:
            parts += [[element], [len(value)]]
            types += [GGUFValueType(element)] * bool(value)
        first, elements = len(parts), [value] if element is None else value
        if key in left_out:
            parts.append(b"")
            data = [first] * len(value)
        else:
            parts += map(str.encode, elements) if GGUFValueType.STRING in types else zip(elements, strict=True)
            data = list(range(first, len(parts)))
        fields[key] = _Field(key, parts, data, types)
    return fields


def _metadata(head: GgufHead, string_arrays: Container[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What transformers' `read_gguf_metadata` returns: arrays of strings only where asked for, else their length."""
    strings = int(GGUFValueType.STRING)
    values = {
        key: len(value) if element == strings and key not in string_arrays else value
        for key, (_, element, value) in head.values.items()
    }
    return values, tuple(tensor.name for tensor in head.tensors)


@contextmanager
def _exchanged(owner: Any, name: str, other: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextmanager
def read_once(path: Path, vocabulary: bool) -> Iterator[str]:
    """While it is open, whatever transformers and gguf read of the head of this file comes out of `read_gguf`.

    Readers of other files work as ever. One file at a time: another thread waits.

    Args:
        path: the .gguf file.
        vocabulary: whether a tokenizer is being made; a model only needs to know how many tokens there are.

    Yields:
        An empty folder to name as the checkpoint, the file itself being named by its absolute path: files that lie
        beside a .gguf file (a tokenizer.json, say) say nothing about it, and transformers would prefer them.

    Raises:
        LitBinqError: see `read_gguf`.
    """
    head = read_gguf(path)

    def ours(given: Any) -> bool:
        return Path(given).resolve() == head.path

    def reader(given: Any, *more: Any, **options: Any) -> Any:
        return _Reader(head, vocabulary) if ours(given) else real_reader(given, *more, **options)

    def metadata_reader(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(gguf_path: str, string_arrays: Container[str] = ()) -> Any:
            return _metadata(head, string_arrays) if ours(gguf_path) else real(gguf_path, string_arrays)

        return read

    with _LOCK, ExitStack() as stack:
        real_reader = gguf.GGUFReader
        stack.enter_context(_exchanged(gguf, "GGUFReader", reader))
        # Asked for every submodule of a model anew, with the same arguments; 4 s of them in a model of 30 blocks.
        stack.enter_context(_exchanged(gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)))
        for name in _METADATA_READERS:
            module = _module(name)
            real = getattr(module, "read_gguf_metadata", None)
            if real is not None and list(inspect.signature(real).parameters) == ["gguf_path", "string_arrays"]:
                stack.enter_context(_exchanged(module, "read_gguf_metadata", metadata_reader(real)))
        yield stack.enter_context(tempfile.TemporaryDirectory(prefix="lit_binq_gguf_"))


def _module(name: str) -> Any:
    """A module of transformers, None where this version has none of the name."""
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except ImportError:
        return None
