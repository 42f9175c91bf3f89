"""What the native tests share: finding the library, calling its kernels, references, one-node models.

Legend: y = ((x * c) B^T) * r + bias, x (M, K), B (N, K) signs, c (K,) and r (N,) float16.
"""

import ctypes
import os
from copy import copy
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lit_binq.formats import packed_width
from lit_binq_onnx.runtime.library import HOW_TO_BUILD, KERNELS_ENTRY, MODE_ENTRY, Mode, NativeLibrary, library_path

LEVELS = [
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
INLINED: dict[str, str] = {}
NOT_INLINED_AHEAD = {"session.disable_aot_function_inlining": "1"}
"""With each of these options and levels the runtime must run the same operator."""

BLOCK = 256
"""Activations that share one table scale (export/csrc/binary/kernel.h)."""


def require_native() -> NativeLibrary:
    """The native library. Skips the test where it is not built, and fails where a build is expected."""
    if library_path() is None:
        _missing("the native library is not installed")
    return NativeLibrary()


def _missing(what: str) -> NoReturn:
    reason = f"{what}: {HOW_TO_BUILD}"
    if os.environ.get("CI") or os.environ.get("LIT_BINQ_REQUIRE_NATIVE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class KernelLibrary(NativeLibrary):
    """The test library: the same objects, with C functions into the kernels and the set "scalar-lut5" beside.

    Installed beside the other where the project is installed to be worked on, never in a wheel.
    """

    _on: str | None = None

    def isas(self) -> list[str]:
        """All sets this machine can run, the best one first, those in plain C++ last."""
        return [one.name for one in self.kernel_sets() if not one.lacks]

    def isa(self) -> str:
        """The set that sessions with this library run."""
        return self._on or self.kernels()

    def on(self, isa: str) -> "KernelLibrary":
        """The same library; sessions with it run this set."""
        made = copy(self)
        made._on = isa
        return made


def require_kernels() -> KernelLibrary:
    """The test library, as `require_native` the other one."""
    path = require_native().path.with_name("liblit_binq_test.so")
    if not path.is_file():
        _missing(f"the test library {path} is not built")
    return KernelLibrary(path)


def instruction_sets(library: KernelLibrary) -> list[str]:
    """All sets this machine can run, plain C++ first: the others are compared with it."""
    return library.isas()[::-1]


def plain_set(isa: str) -> str:
    """The set in plain C++ whose results those of a set equal bit for bit (Kernels::reference of binary/kernel.h)."""
    return "scalar-lut5" if isa in ("avx512", "scalar-lut5") else "scalar"


def plain_results(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the plain sets gave, of the results of all sets. Asserts that the others gave the same bits."""
    for isa, result in results.items():
        np.testing.assert_array_equal(result, results[plain_set(isa)])
    return {isa: result for isa, result in results.items() if isa == plain_set(isa)}


@dataclass
class Problem:
    """One layer. bias is None or (N,)."""

    codes: np.ndarray  # (N, ceil(K/8)) uint8
    r: np.ndarray  # (N,) float16
    c: np.ndarray  # (K,) float16
    bias: np.ndarray | None  # (N,) float32

    @property
    def N(self) -> int:
        return len(self.r)

    @property
    def K(self) -> int:
        return len(self.c)

    def signs(self) -> np.ndarray:
        """(N, K) float64."""
        return np.unpackbits(self.codes, axis=1, bitorder="little")[:, : self.K] * 2.0 - 1.0

    def reference(self, x: np.ndarray) -> np.ndarray:
        """(M, N) float64."""
        y = ((x.astype(np.float64) * self.c.astype(np.float64)) @ self.signs().T) * self.r.astype(np.float64)
        return y if self.bias is None else y + self.bias

    def magnitude(self, x: np.ndarray) -> np.ndarray:
        """(M, N) float64: sum of the magnitudes of everything that is added up."""
        z = np.abs(x.astype(np.float64) * self.c.astype(np.float64)).sum(1, keepdims=True)
        y = z * np.abs(self.r.astype(np.float64))
        return y if self.bias is None else y + np.abs(self.bias)

    def lut_bound(self, x: np.ndarray, isa: str) -> np.ndarray:
        """(M, N) float64: what rounding the tables can cost, see `largest_error`."""
        z = np.abs(x.astype(np.float64) * self.c.astype(np.float64))
        z = np.pad(z, ((0, 0), (0, -self.K % BLOCK)))
        blocks = z.shape[1] // BLOCK
        columns = np.minimum(BLOCK, 8 * packed_width(self.K) - np.arange(blocks) * BLOCK)
        error = [largest_error(z[:, BLOCK * b : BLOCK * b + columns[b]], isa) for b in range(blocks)]
        return np.sum(error, axis=0)[:, None] * np.abs(self.r.astype(np.float64))


def largest_error(z: np.ndarray, isa: str) -> np.ndarray:
    """What rounding the tables of one block can cost.

    Half a unit for each group of 4 activations. Five-input tables are fewer and have larger units, and each of the 5
    activations is rounded to 1/256 of a unit before; which ones share a group is not looked at here.

    Args:
        z: (M, columns) float64 magnitudes, whole bytes of columns.
        isa: whose tables.

    Returns:
        (M,) float64.
    """
    units = z.reshape(len(z), z.shape[1] // 4, 4).sum(2).max(1) / 127
    if plain_set(isa) == "scalar":
        return 0.5 * units * z.shape[1] / 4
    return (0.5 + 5 * 0.5 / 256) * (units + z.max(1) / 127) * z.shape[1] / 4


def random_problem(N: int, K: int, *, bias: bool = True, seed: int = 0) -> Problem:
    """Random signs and padding bits clear, r of both signs, c with some zeros and subnormals."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (N, K), dtype=np.uint8)
    c = rng.uniform(0.2, 2.0, K)
    c[rng.random(K) < 0.05] = 0.0
    c[rng.random(K) < 0.05] = 3e-7  # a float16 subnormal
    return Problem(
        codes=np.packbits(bits, axis=1, bitorder="little"),
        r=rng.standard_normal(N).astype(np.float16),
        c=c.astype(np.float16),
        bias=rng.standard_normal(N).astype(np.float32) if bias else None,
    )


def multiply(library: KernelLibrary, p: Problem, x: np.ndarray, *, exact: bool, isa: str) -> np.ndarray:
    """The kernels without ONNX Runtime, on this thread: (M, K) float32 -> (M, N) float32."""
    call = library.handle.lit_binq_matmul
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_char_p, pointer, *[integer] * 3, *[pointer] * 4, ctypes.c_int, pointer]
    x = np.ascontiguousarray(x, np.float32)
    y = np.full((len(x), p.N), 12345.0, np.float32)
    bias = None if p.bias is None else p.bias.ctypes.data
    tensors = [p.codes.ctypes.data, p.r.ctypes.data, p.c.ctypes.data, bias]
    assert call(isa.encode(), x.ctypes.data, len(x), p.K, p.N, *tensors, int(exact), y.ctypes.data) == 0
    return y


def one_node_model(
    p: Problem,
    x_shape: list[int | str | None] | None,
    *,
    exact: int | None = None,
    K: int | None = None,
    initializers: tuple[str, ...] = ("codes", "row_scale", "col_scale", "bias"),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    """X -> BinaryMatMul -> Y; what is no initializer becomes a graph input. Y's shape is left open."""
    tensors = {"codes": p.codes, "row_scale": p.r, "col_scale": p.c}
    if p.bias is not None:
        tensors["bias"] = p.bias
    attributes = {"K": p.K if K is None else K} | ({} if exact is None else {"exact": exact})
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, x_shape)]
    for name, value in tensors.items():
        if name not in initializers:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, value.shape))
    graph = helper.make_graph(
        [helper.make_node("BinaryMatMul", ["X", *tensors], ["Y"], "layer", domain="lit_binq", **attributes)],
        "one_node",
        inputs,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items() if name in initializers],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)],
        functions=list(functions),
        ir_version=10,
    )


def session(
    model: onnx.ModelProto,
    library: NativeLibrary | None,
    *,
    threads: int = 1,
    level: ort.GraphOptimizationLevel | None = None,
    config: dict[str, str] | None = None,
    mode: Mode | None = None,
) -> ort.InferenceSession:
    """A CPU session, with the native operators where a library is given, in a mode of the session's where one is."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if level is not None:
        options.graph_optimization_level = level
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if mode is not None:
        options.add_session_config_entry(MODE_ENTRY, mode)
    if isinstance(library, KernelLibrary):
        options.add_session_config_entry(KERNELS_ENTRY, library.isa())
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
