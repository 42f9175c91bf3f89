"""Native two-plane kernels: their integers exactly, their sums against float64, on every instruction set.

Legend: x (M, K) activations, A, B (N, K) bits, L numbers a row and group of g columns, P outlier columns, k planes of
activations. Columns are in stored order, outliers first, where nothing else is said.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native import require_native, session
from onnx import TensorProto, helper, numpy_helper

from lit_binq.formats.activations import codes as torch_codes
from lit_binq.formats.activations import quantize
from lit_binq_onnx.library import NativeLibrary

BLOCK = 128
"""Columns that are counted, and share a table scale, together (export/csrc/two_plane_kernel.h)."""

FLOAT_ERROR = 1e-5
"""Of sums in float32, relative to the magnitude of what is added up."""

SUBNORMAL = 1e-37
SETS = ("scalar", "avx2", "avx512")


class Tensors(ctypes.Structure):
    """TwoPlaneTensors of export/csrc/two_plane_matrix.h."""

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
        self.keep = list(self.tensors().values())  # alive as long as the pointers to them
        pointers = {n: t.ctypes.data if t.size else None for n, t in self.tensors().items() if n != "bias"}
        P, L = len(self.outliers), self.levels.shape[2]
        for name, tensor in zip(self.tensors(), self.keep, strict=True):
            if name != "bias" and tensor.size:
                pointers[name] = tensor.ctypes.data
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
    """Stored columns of every block: groups, cut after 128 columns and where the 8-bit part ends."""
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


def multiply(library: NativeLibrary, p: Problem, x: np.ndarray, isa: str, *, exact: bool = False) -> np.ndarray:
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


def integers(library: NativeLibrary, p: Problem, x: np.ndarray, isa: str) -> Integers:
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


@pytest.fixture(scope="module")
def native() -> NativeLibrary:
    return require_native()


@pytest.fixture(scope="module")
def sets(native: NativeLibrary) -> list[str]:
    """Instruction sets with kernels of their own on this machine."""
    call = native.handle.lit_binq_two_plane_isa
    call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    return [isa for isa in SETS if call(isa.encode()) == isa.encode()]


def test_unknown_sets_have_no_kernels(native: NativeLibrary, sets: list[str]) -> None:
    assert "scalar" in sets
    assert native.handle.lit_binq_two_plane_isa(b"abacus") is None
    assert native.handle.lit_binq_two_plane_isa(b"neon") == b"scalar"


# --- integers

SHAPES = (
    {"N": 64, "K": 128},
    {"N": 1, "K": 8, "group": 8},
    {"N": 70, "K": 200, "group": 64},
    {"N": 65, "K": 77, "group": 24},
    {"N": 130, "K": 300, "group": 256},
    {"N": 33, "K": 513, "group": 1000},
    {"N": 40, "K": 100, "group": 20},
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize(("bits", "outliers", "static"), [(4, 0, False), (4, 0, True), (4, 24, False), (8, 0, False)])
def test_counts_are_the_definition(
    native: NativeLibrary, sets: list[str], shape: dict[str, int], L: int, bits: int, outliers: int, static: bool
) -> None:
    if outliers >= shape["K"]:
        outliers = 0
    p = problem(**shape, L=L, bits=bits, outliers=outliers, static=static)
    x = activations(1, p.K)
    stored = torch.from_numpy(np.ascontiguousarray(x[:, p.order]))
    options = {"scales": torch.from_numpy(p.scales), "input_range": torch.from_numpy(p.input_range)}
    q, lo, R = torch_codes(stored, bits=bits, outliers=outliers, **options)
    for isa in sets:
        got = integers(native, p, x, isa)
        assert got.blocks == blocks_of(p)
        assert np.array_equal(got.codes, q[0].numpy())
        assert got.range.tolist() == [float(v) for part in range(2) for v in (lo[0, part], R[0, part])]
        for b, (first, last) in enumerate(got.blocks):
            A, B, here = p.A[:, first:last], p.B[:, first:last], q[0, first:last].numpy()
            for k in range(8):
                plane = here >> k & 1
                assert np.array_equal(got.counts[b, 0, k], (A & plane).sum(1))
                assert np.array_equal(got.counts[b, 1, k], (B & plane).sum(1))
                assert np.array_equal(got.counts[b, 2, k], (A & B & plane).sum(1) if L == 4 else np.zeros(p.N))


@pytest.mark.parametrize("bits", [4, 8])
def test_counts_at_their_largest(native: NativeLibrary, sets: list[str], bits: int) -> None:
    """All bits set, all activations at the top: 128 of 128, which must not overflow a byte."""
    p = problem(64, 256, L=4, bits=bits, static=True, bias=False)
    p.A, p.B = np.ones_like(p.A), np.ones_like(p.B)
    p.codes[:], p.selector[:] = 255, 255
    x = np.full((1, 256), 100.0, np.float32)
    for isa in sets:
        counts = integers(native, p, x, isa).counts
        assert (counts[:, :, :bits] == 128).all()
        got, want = multiply(native, p, x, isa), p.reference(x)
        assert (np.abs(got - want) <= FLOAT_ERROR * p.magnitude(x)).all()


@settings(deadline=None, max_examples=60)
@given(
    x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=16, max_size=16),
    scales=st.lists(st.floats(-0.5, 1.0, width=16), min_size=5, max_size=5),
)
@example(x=[0.0] * 16, scales=[0.0] * 5)
@example(x=[3.5] * 16, scales=[-0.25, 0.5, 0.5, 0.5, 0.5])
@example(x=[i / 15 for i in range(15)] + [1.0], scales=[0.0, 0.0625, 0.125, 0.25, 0.5])
def test_codes_are_torchs(native: NativeLibrary, sets: list[str], x: list[float], scales: list[float]) -> None:
    """Equal levels, levels in any order, ties, constant rows."""
    p = problem(1, 16, group=8, bits=4, outliers=8)
    p.scales = np.array(scales, np.float16)
    row = np.array([x], np.float32)
    stored = torch.from_numpy(np.ascontiguousarray(row[:, p.order]))
    q, _, _ = torch_codes(stored, bits=4, outliers=8, scales=torch.from_numpy(p.scales), input_range=torch.empty(0))
    for isa in sets:
        assert np.array_equal(integers(native, p, row, isa).codes, q[0].numpy())


# --- floats


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0, 8])
@pytest.mark.parametrize("M", [1, 19])
def test_float_products(
    native: NativeLibrary, sets: list[str], shape: dict[str, int], L: int, outliers: int, M: int
) -> None:
    p = problem(**shape, L=L, outliers=outliers if outliers < shape["K"] else 0)
    x = activations(M, p.K)
    want, magnitude = p.reference(x), p.magnitude(x)
    for isa in sets:
        exact = multiply(native, p, x, isa, exact=True)
        assert (np.abs(exact - want) <= FLOAT_ERROR * magnitude).all()
        error = np.abs(multiply(native, p, x, isa) - want)
        assert (error <= p.lut_bound(x) + FLOAT_ERROR * magnitude).all()
        assert error.max() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize(("bits", "outliers", "static"), [(4, 0, False), (4, 24, True), (4, 24, False), (8, 0, True)])
def test_quantized_products(
    native: NativeLibrary, sets: list[str], shape: dict[str, int], L: int, bits: int, outliers: int, static: bool
) -> None:
    p = problem(**shape, L=L, bits=bits, outliers=outliers if outliers < shape["K"] else 0, static=static)
    x = activations(19, p.K)
    want, magnitude = p.reference(x), p.magnitude(x)
    for isa in sets:
        got = multiply(native, p, x, isa)
        assert (np.abs(got - want) <= FLOAT_ERROR * magnitude).all()
        assert np.array_equal(multiply(native, p, x[3:4], isa)[0], got[3])  # the row's company does not matter


def test_tables_err_little(native: NativeLibrary, sets: list[str]) -> None:
    p = problem(256, 1024, L=3, bias=False)
    x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    want = p.reference(x)
    for isa in sets:
        error = np.linalg.norm(multiply(native, p, x, isa) - want) / np.linalg.norm(want)
        assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_rows_that_are_not_finite_are_nan(native: NativeLibrary, sets: list[str], bits: int) -> None:
    p = problem(70, 100, L=4, bits=bits, group=64)
    x = activations(3, 100)
    x[0, 5], x[2, 99] = np.nan, np.inf
    for isa in sets:
        y = multiply(native, p, x, isa)
        assert np.isnan(y[[0, 2]]).all()
        assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("size", [1e37, 1e-37, 0.0])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_extremes(native: NativeLibrary, sets: list[str], size: float, bits: int) -> None:
    p = problem(64, 256, L=4, bits=bits, bias=False)
    p.levels = (p.levels / 64).astype(np.float16)
    x = (activations(2, 256) * size / 20).astype(np.float32)
    want = p.reference(x)
    for isa in sets:
        y = multiply(native, p, x, isa, exact=True)
        assert (np.abs(y - want) <= FLOAT_ERROR * p.magnitude(x) + SUBNORMAL * 1e-5).all()


# --- the operator


def model(p: Problem, shape: list[int | str], *, exact: int | None = None, **attributes: int) -> onnx.ModelProto:
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


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_operator(native: NativeLibrary, bits: int, bias: bool, threads: int) -> None:
    """Shapes, bias, threads: work enough for several tasks."""
    p = problem(600, 1024, L=3, bits=bits, outliers=64, bias=bias)
    x = activations(6, 1024)
    before = native.calls()
    y = session(model(p, ["B", "T", 1024], exact=1), native, threads=threads).run(None, {"X": x.reshape(2, 3, 1024)})[0]
    assert native.calls() == before + 1
    assert y.shape == (2, 3, 600)
    assert (np.abs(y.reshape(6, 600) - p.reference(x)) <= FLOAT_ERROR * p.magnitude(x)).all()


@pytest.mark.parametrize("shape", [(45,), (0, 45), (2, 0, 45)])
def test_other_shapes(native: NativeLibrary, shape: tuple[int, ...]) -> None:
    p = problem(7, 45, group=16, bits=4)
    x = activations(1, 45)[0] if len(shape) == 1 else np.zeros(shape, np.float32)
    y = session(model(p, [*shape]), native).run(None, {"X": x})[0]
    assert y.shape == (*shape[:-1], 7)
    if len(shape) == 1:
        assert (np.abs(y - p.reference(x[None])[0]) <= FLOAT_ERROR * p.magnitude(x[None])[0]).all()


@pytest.mark.parametrize("isa", SETS)
def test_the_operator_follows_the_chosen_set(native: NativeLibrary, sets: list[str], isa: str) -> None:
    """Within one set results are the same bit for bit, with and without ONNX Runtime."""
    if isa not in sets:
        pytest.skip(f"this machine lacks {isa}")
    p, x = problem(70, 300, L=4), activations(3, 300)
    best = native.isa()
    try:
        if native.handle.lit_binq_force_isa(isa.encode()) != 0:
            pytest.skip(f"the library has no operators for {isa}")
        y = session(model(p, ["M", 300]), native).run(None, {"X": x})[0]
    finally:
        native.force_isa(best)
    assert np.array_equal(y, multiply(native, p, x, isa))


def refused(native: NativeLibrary, p: Problem, message: str, **attributes: int) -> None:
    with pytest.raises(Exception, match=message):
        session(model(p, ["M", p.K], **attributes), native)


def test_tensors_that_do_not_fit(native: NativeLibrary) -> None:
    p = problem(8, 64, group=16)
    refused(native, p, r"levels has shape \(8, 4, 2\), expected \(8, 2, 2 to 4\)", group=32)
    refused(native, p, "activation_bits is 5, expected 0, 4 or 8", activation_bits=5)
    refused(native, p, r"input_scales has shape \(0,\), expected \(5,\)", activation_bits=4)
    refused(native, p, r"outlier_bits has shape \(0,\), expected \(8,\)", outliers=8)
    p.levels[0, 1, 1] = np.nan
    refused(native, p, r"levels\[3\] is not finite")
    p = problem(8, 64, group=16, outliers=8)
    refused(native, p, "outlier_bits marks 8 columns, expected 16", outliers=16)
    p = problem(8, 64, group=16)
    p.selector = p.selector[:7]
    refused(native, p, r"selector has shape \(7, 8\), expected \(8, 8\) as codes")
    p = problem(8, 64, bits=4)
    p.input_range = np.zeros(3, np.float32)
    refused(native, p, r"input_range has shape \(3,\), expected \(4,\) or \(0,\)")
    p.input_range = np.array([0, 1, np.inf, 1], np.float32)
    refused(native, p, r"input_range\[2\] is not finite")
