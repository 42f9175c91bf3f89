"""A copy of ONNX Runtime in the same process as the one that Python imports, driven through its C functions.

`python second_runtime.py LIBRARY RUNTIME MODEL` runs the model with both in turn, several times, and prints a JSON
object: the two versions, and whether results and calls were as they should be. Positions in the table of functions are
those of onnxruntime_c_api.h, which never change.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

API_VERSION = 18
ERROR_MESSAGE, CREATE_ENV, SESSION_FROM_ARRAY, RUN, CREATE_OPTIONS = 2, 3, 8, 9, 10
CREATE_TENSOR, TENSOR_DATA, DEFAULT_ALLOCATOR = 48, 51, 78
FLOAT = 1

Pointer = ctypes.c_void_p


def runtime_library(folder: Path) -> Path | None:
    """The shared library that a wheel carries beside its Python module since 1.20, which is a copy of its own."""
    return next(
        iter(sorted(folder.glob("capi/libonnxruntime.so*")) + sorted(folder.glob("capi/libonnxruntime.*dylib"))), None
    )


class Runtime:
    """One copy, by the path of its shared library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.OrtGetApiBase.restype = Pointer
        self.base: int = self.library.OrtGetApiBase()
        get_api, get_version = (Pointer * 2).from_address(self.base)
        self.table: int = ctypes.CFUNCTYPE(Pointer, ctypes.c_uint32)(get_api)(API_VERSION)
        self.version = ctypes.CFUNCTYPE(ctypes.c_char_p)(get_version)().decode()

    def entry(self, position: int) -> int:
        return Pointer.from_address(self.table + 8 * position).value or 0

    def call(self, position: int, *arguments: Any) -> None:
        """Call a function that returns a status."""
        status = ctypes.CFUNCTYPE(Pointer, *[type(a) for a in arguments])(self.entry(position))(*arguments)
        self.expect_success(status)

    def expect_success(self, status: int | None) -> None:
        if status:
            message = ctypes.CFUNCTYPE(ctypes.c_char_p, Pointer)(self.entry(ERROR_MESSAGE))(status)
            raise RuntimeError((message or b"").decode())

    def made(self, position: int, *arguments: Any) -> Pointer:
        """Call a function whose last argument takes what it makes."""
        result = Pointer()
        self.call(position, *arguments, Pointer(ctypes.addressof(result)))
        return result

    def options(self) -> Pointer:
        return self.made(CREATE_OPTIONS)

    def register(self, native: ctypes.CDLL, options: Pointer, base: int | None = None) -> None:
        native.RegisterCustomOps.argtypes, native.RegisterCustomOps.restype = [Pointer, Pointer], Pointer
        self.expect_success(native.RegisterCustomOps(options, base or self.base))

    def run(self, native: ctypes.CDLL, model: bytes, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A session of its own, with our operators: input X to output Y of this shape."""
        options = self.options()
        self.register(native, options)
        env = self.made(CREATE_ENV, ctypes.c_int(3), ctypes.c_char_p(b"second"))
        session = self.made(SESSION_FROM_ARRAY, env, ctypes.c_char_p(model), ctypes.c_size_t(len(model)), options)
        allocator = self.made(DEFAULT_ALLOCATOR)
        dims = (ctypes.c_int64 * x.ndim)(*x.shape)
        where = Pointer(ctypes.addressof(dims))
        value = self.made(CREATE_TENSOR, allocator, where, ctypes.c_size_t(x.ndim), ctypes.c_int(FLOAT))
        ctypes.memmove(self.made(TENSOR_DATA, value).value or 0, x.ctypes.data, x.nbytes)
        names = [(ctypes.c_char_p * 1)(name) for name in (b"X", b"Y")]
        inputs, outputs = (Pointer * 1)(value.value), (Pointer * 1)()
        one = ctypes.c_size_t(1)
        given = [Pointer(ctypes.addressof(a)) for a in (names[0], inputs, names[1], outputs)]
        self.call(RUN, session, Pointer(None), given[0], given[1], one, given[2], one, given[3])
        y = np.empty(shape, np.float32)
        ctypes.memmove(y.ctypes.data, self.made(TENSOR_DATA, Pointer(outputs[0])).value or 0, y.nbytes)
        return y


def main(library: str, runtime: str, model: str) -> None:
    import onnxruntime as ort

    native, second, content = ctypes.CDLL(library), Runtime(Path(runtime)), Path(model).read_bytes()
    native.lit_binq_calls.restype = ctypes.c_int64
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    first = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, first.get_inputs()[0].shape[1])).astype(np.float32)
    equal = []
    for i in range(4):
        (want,) = first.run(None, {"X": x + i})
        equal.append(bool(np.array_equal(second.run(native, content, x + i, want.shape), want)))
    facts = {"first": ort.__version__, "second": second.version, "equal": equal, "calls": native.lit_binq_calls()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
