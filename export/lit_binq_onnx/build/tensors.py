"""The data file of an export: every distinct run of bytes once, whichever graph reads it in whichever shape.

model.onnx and model_fused.onnx read the same packed weights, a tied table is read in two shapes by two operators:
ONNX lets initializers name any place of a file, so equal bytes are written once. Knows bytes and ONNX.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

EXTERNAL_BYTES = 64
"""Smaller tensors stay in the graph's file: the shapes and axes that shape inference wants to read."""

ALIGNMENT = 64
"""A cache line: what vector loads of a mapped file like."""


def _bytes(array: np.ndarray) -> memoryview:
    """An array's memory, row by row."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class DataFile:
    """A data file that is being written.

    Args:
        path: the file; replaced. Graphs that point into it must lie beside it.

    Attributes:
        name: what graphs call it.
        size: bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.size = path, path.name, 0
        self._places: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def holds(self, array: np.ndarray) -> bool:
        """Whether the bytes of an array are in the file already."""
        return hashlib.sha256(_bytes(array)).digest() in self._places

    def place(self, array: np.ndarray) -> tuple[int, int]:
        """Where the bytes of an array are, written now if they were not: (offset, length)."""
        view = _bytes(array)
        digest = hashlib.sha256(view).digest()
        if digest not in self._places:
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT
            self._file.write(b"\0" * (offset - self.size))
            self._file.write(view)
            self._places[digest], self.size = offset, offset + len(view)
        return self._places[digest], len(view)

    def proto(self, name: str, array: np.ndarray) -> TensorProto:
        """An initializer with these values, small ones inside, others in the file."""
        if array.nbytes <= EXTERNAL_BYTES:
            return numpy_helper.from_array(np.ascontiguousarray(array), name)
        offset, length = self.place(array)
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", self.name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
        return tensor

    def take(self, graph: ir.Graph) -> None:
        """Move the initializers of a graph that are not small into the file, in place."""
        for name, value in graph.initializers.items():
            if value.const_value is None or value.const_value.nbytes <= EXTERNAL_BYTES:
                continue
            array = value.const_value.numpy()
            offset, length = self.place(array)
            value.const_value = ir.ExternalTensor(
                self.name,
                offset,
                length,
                value.const_value.dtype,
                shape=ir.Shape(array.shape),
                name=name,
                base_dir=self.path.parent,
            )
