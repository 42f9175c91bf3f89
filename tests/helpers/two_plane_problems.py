"""Random two-plane layers, their definition in numpy, and the native kernels called on them.

Legend: x (M, K) activations, A, B (N, K) bits, L numbers a row and group of g columns, P outlier columns, k planes of
activations. Columns are in stored order, outliers first, where nothing else is said.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from lit_binq.formats.activations import quantize
from native import KernelLibrary

BLOCK = 160
"""Columns that are counted, and share a table scale, together (export/csrc/two_plane/kernel.h)."""

FLOAT_ERROR = 1e-5
"""Of sums in float32, relative to the magnitude of what is added up."""

SUBNORMAL = 1e-37
SETS = ("scalar", "avx2", "avx512")


class Tensors(ctypes.Structure):
    """TwoPlaneTensors of export/csrc/two_plane/matrix.h."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("codes", "selector", "levels", "outlier_bits", "input_scales", "input_range")),
        *((n, ctypes.c_int64) for n in ("N", "K", "group", "L", "activation_bits", "P")),
    ]


@dataclass
class Problem:
    """One layer; tensors as stored, padding bits random where they must not count."""

    A: np.ndarray
    B: np.ndarray
    codes: np.ndarray
    selector: np.ndarray
    levels: np.ndarray  # (N, G, L) float16
    outliers: np.ndarray  # (P,) columns of x
    scales: np.ndarray  # (5,) float16, or (0,)
    input_range: np.ndarray  # (4,) float32, or (0,)
    bias: np.ndarray | None
    group: int
    bits: int
    keep: list[np.ndarray] = field(default_factory=list)

    @property
    def N(self) -> int:
        return len(self.A)

    @property
    def K(self) -> int:
        return self.A.shape[1]

    @property
    def order(self) -> np.ndarray:
        """(K,) columns of x in stored order."""
        return np.concatenate([self.outliers, np.setdiff1d(np.arange(self.K), self.outliers)]).astype(np.int64)

    @property
    def outlier_bits(self) -> np.ndarray:
        marked = np.zeros(self.K, np.uint8)
        marked[self.outliers] = 1
        return np.packbits(marked, bitorder="little") if len(self.outliers) else np.zeros(0, np.uint8)

    def tensors(self) -> dict[str, np.ndarray]:
        """Inputs of the operator but x."""
        named = {
            "codes": self.codes,
            "selector": self.selector,
            "levels": self.levels,
            "outlier_bits": self.outlier_bits,
            "input_scales": self.scales,
            "input_range": self.input_range,
        }
        return named if self.bias is None else {**named, "bias": self.bias}

    def attributes(self) -> dict[str, int]:
        return {"K": self.K, "group": self.group, "activation_bits": self.bits, "outliers": len(self.outliers)}

    def structure(self) -> Tensors:
        tensors = self.tensors()
        self.keep = list(tensors.values())  # alive as long as the pointers to them
        pointers = {n: t.ctypes.data if t.size else None for n, t in tensors.items() if n != "bias"}
        P, L = len(self.outliers), self.levels.shape[2]
        return Tensors(**pointers, N=self.N, K=self.K, group=self.group, L=L, activation_bits=self.bits, P=P)

    def dense(self) -> np.ndarray:
        """(N, K) float64."""
        number = np.repeat(self.levels.astype(np.float64), self.group, axis=1)[:, : self.K]  # (N, K, L)
        if number.shape[2] == 4:
            W: np.ndarray = np.take_along_axis(number, (self.A + 2 * self.B)[:, :, None].astype(int), 2)[:, :, 0]
            return W
        W = (2.0 * self.A - 1) * number[:, :, -2] + (2.0 * self.B - 1) * number[:, :, -1]
        return W + number[:, :, 0] if number.shape[2] == 3 else W

    def largest(self) -> np.ndarray:
        """(N, K): the sum of the sizes of what a weight is added up from."""
        number = np.repeat(np.abs(self.levels.astype(np.float64)), self.group, axis=1)[:, : self.K]
        sizes: np.ndarray = 2 * number.max(2) if number.shape[2] == 4 else number.sum(2)
        return sizes

    def quantized(self, x: np.ndarray) -> np.ndarray:
        """(M, K): what torch replaces x by, in stored order."""
        stored = torch.from_numpy(np.ascontiguousarray(x[:, self.order]))
        options = {"bits": self.bits, "outliers": len(self.outliers)}
        scales, input_range = torch.from_numpy(self.scales), torch.from_numpy(self.input_range)
        return quantize(stored, **options, scales=scales, input_range=input_range).numpy().astype(np.float64)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """(M, N) float64."""
        y: np.ndarray = self.quantized(x) @ self.dense().T
        return y if self.bias is None else y + self.bias

    def magnitude(self, x: np.ndarray) -> np.ndarray:
        """(M, N): sum of the sizes of what is added up; planes add numbers as large as the range."""
        used = np.abs(self.quantized(x))
        if self.bits:
            used = used + np.abs(used).max(1, keepdims=True)
        y: np.ndarray = used @ self.largest().T
        return y if self.bias is None else y + np.abs(self.bias)

    def lut_bound(self, x: np.ndarray) -> np.ndarray:
        """(M, N): half a table unit for each 4 columns and plane of weights."""
        total = np.zeros((len(x), self.N))
        stored, sizes = np.abs(x[:, self.order].astype(np.float64)), self.largest()
        for first, last in blocks_of(self):
            z = np.pad(stored[:, first:last], ((0, 0), (0, -(last - first) % 4)))
            largest = z.reshape(len(x), -1, 4).sum(2).max(1)
            total += 0.5 / 127 * np.ceil((last - first) / 4) * np.outer(largest, sizes[:, first])
        return total


def blocks_of(p: Problem) -> list[tuple[int, int]]:
    """Stored columns of every block: groups, cut after 160 columns and where the 8-bit part ends."""
    eight = {0: 0, 4: len(p.outliers), 8: p.K}[p.bits]
    blocks, first = [], 0
    while first < p.K:
        ends = [(first // p.group + 1) * p.group, first + BLOCK, p.K]
        last = min([*ends, eight] if first < eight else ends)
        blocks.append((first, last))
        first = last
    return blocks


def random_bits(rng: np.random.Generator, N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    every = rng.integers(0, 2, (N, -(-K // 8) * 8), dtype=np.uint8)
    return every[:, :K], np.packbits(every, axis=1, bitorder="little")


def problem(
    N: int,
    K: int,
    *,
    L: int = 2,
    group: int = 128,
    bits: int = 0,
    outliers: int = 0,
    static: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    rng = np.random.default_rng(seed)
    (A, codes), (B, selector) = random_bits(rng, N, K), random_bits(rng, N, K)
    levels = rng.standard_normal((N, -(-K // group), L))
    levels[rng.random(levels.shape) < 0.05] = 0
    levels[rng.random(levels.shape) < 0.05] = 3e-7  # a float16 subnormal
    scales = np.array([0.02, 0.08, 0.12, 0.27, 0.5]) + 0.02 * rng.random(5) if bits == 4 else np.zeros(0)
    return Problem(
        A,
        B,
        codes,
        selector,
        levels.astype(np.float16),
        np.sort(rng.permutation(K)[:outliers]),
        scales.astype(np.float16),
        np.array([-2.5, 5.1, -9.0, 20.0] if static and bits else [], np.float32),
        rng.standard_normal(N).astype(np.float32) if bias else None,
        group,
        bits,
    )


def activations(M: int, K: int, seed: int = 1) -> np.ndarray:
    """Heavy tails, as real ones."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((M, K)) * np.exp(0.5 * rng.standard_normal(K))).astype(np.float32)


def multiply(library: KernelLibrary, p: Problem, x: np.ndarray, isa: str, *, exact: bool = False) -> np.ndarray:
    """(M, N) float32, without ONNX Runtime."""
    y = np.full((len(x), p.N), 12345.0, np.float32)
    x, structure = np.ascontiguousarray(x), p.structure()
    call = library.handle.lit_binq_two_plane_matmul
    pointer = ctypes.c_void_p
    call.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int, pointer, ctypes.c_int64, pointer, pointer]
    bias = None if p.bias is None else p.bias.ctypes.data
    address = ctypes.addressof(structure)
    assert call(isa.encode(), address, int(exact), x.ctypes.data, len(x), bias, y.ctypes.data) == 0
    return y


@dataclass
class Integers:
    """Of one quantized row: codes (K,), lo and R of both parts (4,), counts (blocks, 3, 8, N)."""

    codes: np.ndarray
    range: np.ndarray
    counts: np.ndarray
    blocks: list[tuple[int, int]]


def integers(library: KernelLibrary, p: Problem, x: np.ndarray, isa: str) -> Integers:
    call = library.handle.lit_binq_two_plane_counts
    call.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 6]
    call.restype = ctypes.c_int64
    structure = p.structure()
    address, x = ctypes.addressof(structure), np.ascontiguousarray(x)
    count = call(isa.encode(), address, x.ctypes.data, None, None, None, None)
    assert count > 0
    columns, codes = np.zeros((count, 2), np.int64), np.zeros(p.K, np.uint8)
    found, counts = np.zeros(4, np.float32), np.full((count, 3, 8, p.N), -1, np.int32)
    pointers = [a.ctypes.data for a in (x, columns, codes, found, counts)]
    assert call(isa.encode(), address, *pointers) == count
    return Integers(codes, found, counts, [(int(c), int(c + n)) for c, n in columns])


def model(p: Problem, shape: list[int | str], *, exact: int | None = None, **attributes: int) -> onnx.ModelProto:
    """X -> TwoPlaneMatMul -> Y."""
    tensors = p.tensors()
    numbers = p.attributes() | attributes | ({} if exact is None else {"exact": exact})
    graph = helper.make_graph(
        [helper.make_node("TwoPlaneMatMul", ["X", *tensors], ["Y"], "layer", domain="lit_binq", **numbers)],
        "one_node",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [*shape[:-1], p.N])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)
