"""Native two-plane kernels: their integers exactly, their sums against float64, on every instruction set.

Legend: x (M, K) activations, A, B (N, K) bits, L numbers a row and group of g columns, P outlier columns, k planes of
activations. Columns are in stored order, outliers first, where nothing else is said.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_binq.formats.activations import codes as torch_codes
from native import KernelLibrary, require_kernels, session
from two_plane_problems import (
    FLOAT_ERROR,
    SETS,
    SUBNORMAL,
    Problem,
    activations,
    blocks_of,
    integers,
    model,
    multiply,
    problem,
)


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


@pytest.fixture(scope="module")
def sets(native: KernelLibrary) -> list[str]:
    """Instruction sets with kernels of their own on this machine."""
    return [isa for isa in SETS if isa in native.isas()]


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
    native: KernelLibrary, sets: list[str], shape: dict[str, int], L: int, bits: int, outliers: int, static: bool
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
def test_counts_at_their_largest(native: KernelLibrary, sets: list[str], bits: int) -> None:
    """All bits set, all activations at the top: 160 of 160, which must not overflow a byte."""
    p = problem(64, 320, L=4, group=320, bits=bits, static=True, bias=False)
    p.A, p.B = np.ones_like(p.A), np.ones_like(p.B)
    p.codes[:], p.selector[:] = 255, 255
    x = np.full((1, 320), 100.0, np.float32)
    for isa in sets:
        counts = integers(native, p, x, isa).counts
        assert (counts[:, :, :bits] == 160).all()
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
def test_codes_are_torchs(native: KernelLibrary, sets: list[str], x: list[float], scales: list[float]) -> None:
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
    native: KernelLibrary, sets: list[str], shape: dict[str, int], L: int, outliers: int, M: int
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
    native: KernelLibrary, sets: list[str], shape: dict[str, int], L: int, bits: int, outliers: int, static: bool
) -> None:
    p = problem(**shape, L=L, bits=bits, outliers=outliers if outliers < shape["K"] else 0, static=static)
    x = activations(19, p.K)
    want, magnitude = p.reference(x), p.magnitude(x)
    for isa in sets:
        got = multiply(native, p, x, isa)
        assert (np.abs(got - want) <= FLOAT_ERROR * magnitude).all()
        assert np.array_equal(multiply(native, p, x[3:4], isa)[0], got[3])  # the row's company does not matter


def test_tables_err_little(native: KernelLibrary, sets: list[str]) -> None:
    p = problem(256, 1024, L=3, bias=False)
    x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    want = p.reference(x)
    for isa in sets:
        error = np.linalg.norm(multiply(native, p, x, isa) - want) / np.linalg.norm(want)
        assert 1e-4 < error < 1e-2


def rounded_dense(p: Problem) -> np.ndarray:
    """(N, K) float64: weights of four levels as two_plane/kernel.h rounds them, from its words."""
    l0, l1, l2, l3 = np.moveaxis(p.levels.astype(np.float64), 2, 0)
    m = np.stack([l3 - l0 + l1 - l2, l3 - l0 - l1 + l2, l1 + l2 - l0 - l3, l0 + l1 + l2 + l3], 2) / 4
    unit = np.abs(m).max((1, 2), keepdims=True) / 2047
    m = np.rint(np.divide(m, unit, out=np.zeros_like(m), where=unit > 0)) * unit
    m = np.repeat(m, p.group, axis=1)[:, : p.K]
    A, B = 2.0 * p.A - 1, 2.0 * p.B - 1
    weights: np.ndarray = m[:, :, 3] + m[:, :, 0] * A + m[:, :, 1] * B - m[:, :, 2] * A * B
    return weights


@pytest.mark.parametrize("spread", [1.0, 1e3, 0.0])
@pytest.mark.parametrize("shape", [{"N": 70, "K": 300, "group": 64}, {"N": 64, "K": 512, "group": 128}])
def test_rounded_levels_follow_their_definition(
    native: KernelLibrary, sets: list[str], shape: dict[str, int], spread: float
) -> None:
    """Activations whose tables are exact: one whole number in each 4 columns, the largest of a block 127."""
    p = problem(**shape, L=4, bias=False)
    p.levels[:, 0] = (p.levels[:, 0] * spread).astype(np.float16)  # a group far above the others
    p.levels[3] = 0
    rng = np.random.default_rng(0)
    x = np.zeros((2, p.K), np.float32)
    x[:, 1::4] = rng.integers(-127, 128, x[:, 1::4].shape)
    x[:, 1 :: p.group] = 127
    for isa in sets:
        weights = rounded_dense(p) if isa == "avx512" else p.dense()
        want = x @ weights.T
        for rows in (x, x[:1]):
            y = multiply(native, p, rows, isa)
            assert (np.abs(y - want[: len(rows)]) <= FLOAT_ERROR * (np.abs(rows) @ np.abs(p.dense()).T)).all()
            assert (y[:, 3] == 0).all()


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_rows_that_are_not_finite_are_nan(native: KernelLibrary, sets: list[str], bits: int) -> None:
    p = problem(70, 100, L=4, bits=bits, group=64)
    x = activations(3, 100)
    x[0, 5], x[2, 99] = np.nan, np.inf
    for isa in sets:
        y = multiply(native, p, x, isa)
        assert np.isnan(y[[0, 2]]).all()
        assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("size", [1e37, 1e-37, 0.0])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_extremes(native: KernelLibrary, sets: list[str], size: float, bits: int) -> None:
    p = problem(64, 256, L=4, bits=bits, bias=False)
    p.levels = (p.levels / 64).astype(np.float16)
    x = (activations(2, 256) * size / 20).astype(np.float32)
    want = p.reference(x)
    bound = FLOAT_ERROR * p.magnitude(x) + SUBNORMAL * 1e-5
    for isa in sets:
        assert (np.abs(multiply(native, p, x, isa, exact=True) - want) <= bound).all()
        if bits == 0:
            assert (np.abs(multiply(native, p, x, isa) - want) <= bound + p.lut_bound(x)).all()


# --- the operator


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_operator(native: KernelLibrary, bits: int, bias: bool, threads: int) -> None:
    """Shapes, bias, threads: work enough for several tasks."""
    p = problem(600, 1024, L=3, bits=bits, outliers=64, bias=bias)
    x = activations(6, 1024)
    before = native.calls()
    y = session(model(p, ["B", "T", 1024], exact=1), native, threads=threads).run(None, {"X": x.reshape(2, 3, 1024)})[0]
    assert native.calls() == before + 1
    assert y.shape == (2, 3, 600)
    assert (np.abs(y.reshape(6, 600) - p.reference(x)) <= FLOAT_ERROR * p.magnitude(x)).all()


@pytest.mark.parametrize("shape", [(45,), (0, 45), (2, 0, 45)])
def test_other_shapes(native: KernelLibrary, shape: tuple[int, ...]) -> None:
    p = problem(7, 45, group=16, bits=4)
    x = activations(1, 45)[0] if len(shape) == 1 else np.zeros(shape, np.float32)
    y = session(model(p, [*shape]), native).run(None, {"X": x})[0]
    assert y.shape == (*shape[:-1], 7)
    if len(shape) == 1:
        assert (np.abs(y - p.reference(x[None])[0]) <= FLOAT_ERROR * p.magnitude(x[None])[0]).all()


@pytest.mark.parametrize("isa", SETS)
def test_the_operator_follows_the_chosen_set(native: KernelLibrary, sets: list[str], isa: str) -> None:
    """Within one set results are the same bit for bit, with and without ONNX Runtime."""
    if isa not in sets:
        pytest.skip(f"this machine lacks {isa}")
    p, x = problem(70, 300, L=4), activations(3, 300)
    y = session(model(p, ["M", 300]), native.on(isa)).run(None, {"X": x})[0]
    assert np.array_equal(y, multiply(native, p, x, isa))


def refused(native: KernelLibrary, p: Problem, message: str, **attributes: int) -> None:
    with pytest.raises(Exception, match=message):
        session(model(p, ["M", p.K], **attributes), native)


def test_tensors_that_do_not_fit(native: KernelLibrary) -> None:
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
