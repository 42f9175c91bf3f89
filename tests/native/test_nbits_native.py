"""Native kernels for tables of 4 and 8 bits: rounded mode bit for bit by its definition, exact mode against float64.

Legend: as in `nbits_problems`.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import KernelLibrary, require_kernels
from nbits_problems import SETS, Problem, activations, multiply, problem

ROUNDING = 2.0**-24
"""Of float32, relative."""


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


@pytest.fixture(scope="module")
def sets(native: KernelLibrary) -> list[str]:
    """Instruction sets with kernels of their own on this machine."""
    return [isa for isa in SETS if isa in native.isas()]


def check(native: KernelLibrary, sets: list[str], p: Problem, x: np.ndarray, *, halves: bool | None = None) -> None:
    """Both modes on every set. Rounded: equal to the definition. Exact: equal on all sets, near float64."""
    rounded, exact = p.rounded(x), None
    bound = (p.g / 4 + 3 + 1) * ROUNDING * p.magnitude(x) + np.abs(p.reference(x)) * ROUNDING
    for isa in sets:
        y, packed = multiply(native, p, x, exact=False, isa=isa)
        np.testing.assert_array_equal(y, rounded, err_msg=isa)
        if halves is not None:
            assert packed == halves
        y, _ = multiply(native, p, x, exact=True, isa=isa)
        assert (np.abs(y - p.reference(x)) <= bound + 1e-45).all(), isa
        exact = y if exact is None else exact
        np.testing.assert_array_equal(y, exact, err_msg=isa)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("g", [16, 32, 64, 128, 256])
def test_blocks_tails_and_rows(native: KernelLibrary, sets: list[str], bits: int, zeros: bool, g: int) -> None:
    """Whole blocks and tails, rows that fill no tile, one block and several, M on both sides of a panel's groups."""
    for N, K, M in ((1, 1, 1), (16, g, 2), (19, 3 * g, 3), (33, 2 * g + 7, 17), (15, 5 * g - 1, 5)):
        p = problem(N, K, bits=bits, g=g, zeros=zeros, half=M != 3, seed=K)
        check(native, sets, p, activations(M, K), halves=M != 3 or not p.scales.any())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(0, 9),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(N: int, K: int, M: int, bits: int, g: int, zeros: bool, half: bool, seed: int) -> None:
    native = require_kernels()
    p = problem(N, K, bits=bits, g=g, zeros=zeros, half=half, seed=seed)
    check(native, list(native.isas()), p, activations(M, K, seed))


def test_many_rows_are_single_rows(native: KernelLibrary, sets: list[str]) -> None:
    """Panels and groups of rows change nothing."""
    for bits in (4, 8):
        p, x = problem(20, 100, bits=bits), activations(70, 100)
        for isa in sets:
            for exact in (False, True):
                together = multiply(native, p, x, exact=exact, isa=isa)[0]
                alone = [multiply(native, p, row[None], exact=exact, isa=isa)[0] for row in x]
                np.testing.assert_array_equal(together, np.concatenate(alone))
                assert multiply(native, p, x[:0], exact=exact, isa=isa)[0].shape == (0, 20)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("g", [16, 32, 256])
def test_largest_integers(native: KernelLibrary, sets: list[str], bits: int, g: int) -> None:
    """Codes, zero points and activations at their ends, where a sum of 16 bits would be the first to overflow."""
    top, K = (1 << bits) - 1, 2 * g
    for q in (0, top, None):
        for z in (0, 255, None):
            codes = np.random.default_rng(1).choice([0, 255], (17, 2, g * bits // 8)).astype(np.uint8)
            if q is not None:
                codes[:] = 255 * (q > 0)
            zeros = None if z is None else np.full((17, -(-2 * bits // 8)), z, np.uint8)
            p = Problem(codes, np.ones((17, 2), np.float32), zeros, K, bits)
            signs = np.random.default_rng(2).choice([-1, 1], K)
            x = np.stack([np.ones(K), -np.ones(K), signs, -signs]).astype(np.float32)
            check(native, sets, p, x, halves=True)
            y = multiply(native, p, x, exact=False, isa="scalar")[0]  # 127 steps of 1 / 127
            np.testing.assert_allclose(y, p.reference(x), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("x_size", [1e-45, 1e-38, 1.0, 3e37])
@pytest.mark.parametrize("s_size", [1e-45, 1e-38, 1.0, 1e37])
def test_extreme_sizes(native: KernelLibrary, sets: list[str], bits: int, x_size: float, s_size: float) -> None:
    """Subnormal and huge activations and scales: nothing is lost on the way but what float32 cannot hold in the end."""
    p, x = problem(18, 70, bits=bits, half=False), activations(3, 70)
    p = replace(p, scales=(p.scales * np.float32(s_size)).astype(np.float32))
    x = (x / np.abs(x).max() * x_size).astype(np.float32)
    with np.errstate(over="ignore"):
        want = p.reference(x).astype(np.float32)
    bound = (p.g / 4 + 5) * ROUNDING * p.magnitude(x) + 1e-45
    for isa in sets:
        np.testing.assert_array_equal(multiply(native, p, x, exact=False, isa=isa)[0], p.rounded(x), err_msg=isa)
        y = multiply(native, p, x, exact=True, isa=isa)[0]
        near = np.isfinite(want) & np.isfinite(y)
        assert (np.abs(y[near].astype(np.float64) - want[near]) <= bound[near]).all(), isa
        assert (np.abs(p.reference(x)[~near]) > 3.39e38).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(native: KernelLibrary, sets: list[str], value: float) -> None:
    p, x = problem(21, 90), activations(9, 90)
    bad = x.copy()
    bad[[0, 4, 7], [89, 3, 50]] = value
    for isa in sets:
        for exact in (False, True):
            clean = multiply(native, p, x, exact=exact, isa=isa)[0]
            y = multiply(native, p, bad, exact=exact, isa=isa)[0]
            assert np.isnan(y[[0, 4, 7]]).all()
            np.testing.assert_array_equal(np.delete(y, [0, 4, 7], 0), np.delete(clean, [0, 4, 7], 0))


def test_zero_rows_blocks_and_scales(native: KernelLibrary, sets: list[str]) -> None:
    """Activations of zero, blocks that are negligible beside others, scales of zero."""
    p, x = problem(17, 96), activations(4, 96)
    x[0] = 0
    x[1, 32:64] *= np.float32(1e-33)
    x[2, :] = 0
    x[2, 95] = -3
    p.scales[3] = 0
    check(native, sets, p, x, halves=True)
    for isa in sets:
        y = multiply(native, p, x, exact=False, isa=isa)[0]
        assert not y[0].any()
        assert not y[:, 3].any()


def test_scales_that_float16_does_not_hold(native: KernelLibrary) -> None:
    """One scale with 12 bits, or one that is too small beside others, changes the packed form of all; size does not."""
    p, x = problem(40, 64), activations(2, 64)
    for factor, halves in ((1.0, True), (2.0**-100, True), (2.0**100, True), (-(2.0**-9), True)):
        q = replace(p, scales=p.scales * np.float32(factor))
        assert multiply(native, q, x, exact=False, isa="scalar")[1] == halves
    for value in (1 + 2.0**-11, 2.0**-60):
        scales = np.ones_like(p.scales)
        scales[37, 1] = value
        q = replace(p, scales=scales)
        check(native, ["scalar", native.isa()], q, x, halves=False)
