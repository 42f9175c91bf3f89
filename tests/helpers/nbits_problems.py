"""What the tests of the operator NBitsMatMul share: random tables, references, the kernels, one-node models.

Legend: M rows of x, N rows and K columns of the weight, g block, G = ceil(K / g); W_nj = s[n, j // g] (q_nj - z).
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lit_binq_onnx.functions import DOMAIN, add_functions
from native import KernelLibrary

SETS = ("scalar", "avx2", "avx512", "neon")


@dataclass
class Problem:
    """One table as MatMulNBits stores it."""

    codes: np.ndarray  # (N, G, g bits / 8) uint8
    scales: np.ndarray  # (N, G) float32
    zeros: np.ndarray | None  # (N, ceil(G bits / 8)) uint8
    K: int
    bits: int

    @property
    def N(self) -> int:
        return len(self.codes)

    @property
    def G(self) -> int:
        return self.codes.shape[1]

    @property
    def g(self) -> int:
        return self.codes.shape[2] * 8 // self.bits

    def steps(self) -> np.ndarray:
        """q - z, (N, G, g) int64, codes beyond column K too."""
        q = _digits(self.codes, self.bits).reshape(self.N, self.G, self.g)
        if self.zeros is None:
            return q - (1 << (self.bits - 1))
        return q - _digits(self.zeros, self.bits)[:, : self.G, None]

    def dense(self) -> np.ndarray:
        """W (N, K) float64."""
        return (self.steps() * self.scales[:, :, None].astype(np.float64)).reshape(self.N, -1)[:, : self.K]

    def reference(self, x: np.ndarray) -> np.ndarray:
        """x W^T, (M, N) float64."""
        return x.astype(np.float64) @ self.dense().T

    def magnitude(self, x: np.ndarray) -> np.ndarray:
        """(M, N) float64: the sum of the magnitudes of all products."""
        return np.abs(x.astype(np.float64)) @ np.abs(self.dense()).T

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """(M, N) float32: what rounded mode is defined to give, operation by operation (csrc/nbits/kernel.h).

        Finite rows of x only. Weights' scales are divided by a power of two of each 16 rows.
        """
        f = np.float32
        M, steps, y = len(x), self.steps(), np.empty((len(x), self.N), np.float32)
        tile_power = np.zeros(self.N, np.int64)
        for n in range(0, self.N, 16):
            largest = np.abs(self.scales[n : n + 16]).max()
            tile_power[n : n + 16] = np.frexp(largest)[1] - 15 if largest else 0
        scales = np.ldexp(self.scales, -tile_power[:, None])
        for m in range(M):
            largest = np.abs(x[m]).max()
            e = int(np.clip(np.frexp(largest)[1] - 1, -126, 126)) if largest else 0
            v = np.zeros(self.G * self.g, f)
            v[: self.K] = x[m] * f(2.0**-e)
            blocks = v.reshape(self.G, self.g)
            top = np.abs(blocks).max(1)
            small = top < f(2.0**-100)
            safe = np.where(small, f(1), top)
            inverse, unit = (np.where(small, f(0), a) for a in (f(127) / safe, safe / f(127)))
            a = np.rint(blocks * inverse[:, None]).astype(np.int64)
            integers = np.einsum("ngj,gj->ng", steps, a)
            total = np.zeros(self.N, f)
            for b in range(self.G):
                total = total + (integers[:, b].astype(f) * unit[b]) * scales[:, b]
            with np.errstate(over="ignore"):
                y[m] = np.ldexp(total.astype(np.float64), tile_power + e).astype(f)
        return y


def _digits(packed: np.ndarray, bits: int) -> np.ndarray:
    """(N, digits of a row) int64 of packed bytes (N, ...)."""
    flat = packed.reshape(len(packed), -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], 2).reshape(len(flat), -1)
    return flat.astype(np.int64)


def half_scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 of 11 significant bits, of both signs, over 12 octaves, some zero."""
    s = (rng.standard_normal(shape) * np.exp2(rng.integers(-12, 1, shape))).astype(np.float16).astype(np.float32)
    s[rng.random(shape) < 0.05] = 0
    return s


def problem(
    N: int, K: int, *, bits: int = 4, g: int = 32, zeros: bool = True, half: bool = True, seed: int = 0
) -> Problem:
    """Random codes, zero points and scales; codes beyond column K are random too."""
    rng = np.random.default_rng(seed)
    G = -(-K // g)
    scales = half_scales(rng, N, G)
    if not half:
        scales = (scales * np.float32(1.0001)).astype(np.float32)
    points = rng.integers(0, 256, (N, -(-G * bits // 8)), dtype=np.uint8) if zeros else None
    codes = rng.integers(0, 256, (N, G, g * bits // 8), dtype=np.uint8)
    return Problem(codes, scales, points, K, bits)


def activations(M: int, K: int, seed: int = 0) -> np.ndarray:
    """(M, K) float32, of sizes over some octaves."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((M, K)) * np.exp2(rng.integers(-6, 3, (M, K)))).astype(np.float32)


class _Tensors(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("block", ctypes.c_int64),
    )


def multiply(native: KernelLibrary, p: Problem, x: np.ndarray, *, exact: bool, isa: str) -> tuple[np.ndarray, bool]:
    """The kernels without ONNX Runtime: y (M, N) float32, and whether scales were packed as float16."""
    call = native.handle.lit_binq_nbits_matmul
    pointer = ctypes.c_void_p
    call.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int, pointer, ctypes.c_int64, pointer]
    x = np.ascontiguousarray(x, np.float32)
    y = np.full((len(x), p.N), 12345.0, np.float32)
    zeros = None if p.zeros is None else p.zeros.ctypes.data
    t = _Tensors(p.codes.ctypes.data, p.scales.ctypes.data, zeros, p.N, p.K, p.bits, p.g)
    halves = call(isa.encode(), ctypes.addressof(t), int(exact), x.ctypes.data, len(x), y.ctypes.data)
    assert halves in (0, 1)
    return y, bool(halves)


def one_node_model(
    p: Problem,
    x_shape: list[int | str | None] | None,
    *,
    body: bool = False,
    flat: bool = False,
    computed: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    **attributes: int,
) -> onnx.ModelProto:
    """X -> NBitsMatMul -> Y.

    Args:
        p: the table.
        x_shape: of X.
        body: carry the function body.
        flat: scales and zero points of one dimension.
        computed: names of tensors that are inputs of the graph.
        tensors: replaces what is stored.
        attributes: replace the node's; a negative one is left out.
    """
    stored = {"codes": p.codes, "scales": p.scales} | ({} if p.zeros is None else {"zero_points": p.zeros})
    if flat:
        stored = {name: a if name == "codes" else a.reshape(-1) for name, a in stored.items()}
    stored |= tensors or {}
    numbers = {"K": p.K, "N": p.N, "bits": p.bits, "block_size": p.g} | attributes
    numbers = {name: value for name, value in numbers.items() if value != -1}
    graph = helper.make_graph(
        [helper.make_node("NBitsMatMul", ["X", *stored], ["Y"], "table", domain=DOMAIN, **numbers)],
        "one_node",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, x_shape),
            *(
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(stored[n].dtype), stored[n].shape)
                for n in computed
            ),
        ],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in stored.items() if n not in computed],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if body:
        add_functions(model)
    return model
