"""The native kernels against float64, against their definition, and against each other."""

import ctypes

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from native import (
    BLOCK,
    KernelLibrary,
    Problem,
    instruction_sets,
    multiply,
    plain_results,
    plain_set,
    random_problem,
    require_kernels,
)

# Exact mode: kernel.h derives 36 roundings in float32; two more make z, one each scales and adds the bias.
EXACT_ERROR = 3e-6
FLOAT_ERROR = 1e-5  # LUT mode: what float32 adds to the rounding of the tables
SUBNORMAL = 3e-45  # a result below float32's normal range is rounded to a multiple of 1.4e-45


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


def both_modes_agree(native: KernelLibrary, p: Problem, x: np.ndarray) -> None:
    """All instruction sets give the bits of their plain one, and those lie within what the modes promise."""
    results = {}
    for exact in (False, True):
        everywhere = {isa: multiply(native, p, x, exact=exact, isa=isa) for isa in instruction_sets(native)}
        results[exact] = plain_results(everywhere)
    want, magnitude = p.reference(x), p.magnitude(x)
    for isa, y in results[True].items():
        error = np.abs(y - want)
        assert (error <= EXACT_ERROR * magnitude + SUBNORMAL).all(), (isa, (error / magnitude).max())
    for isa, y in results[False].items():
        error = np.abs(y - want)
        bound = p.lut_bound(x, isa) + FLOAT_ERROR * magnitude + SUBNORMAL
        assert (error <= bound).all(), (isa, (error / magnitude).max())


@settings(deadline=None, max_examples=60)
@given(
    M=st.integers(0, 140),
    N=st.integers(1, 300),
    K=st.integers(1, 700),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(M=1, N=1, K=1, bias=False, seed=0)
@example(M=129, N=129, K=257, bias=True, seed=1)  # one more than a panel, a tile, a block
@example(M=0, N=5, K=9, bias=True, seed=2)
@example(M=2, N=96, K=256, bias=True, seed=3)
def test_any_shape(native: KernelLibrary, M: int, N: int, K: int, bias: bool, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)
    both_modes_agree(native, random_problem(N, K, bias=bias, seed=seed), x)


@pytest.mark.parametrize("M", [1, 5, 17])
def test_layers_too_large_for_a_cache(native: KernelLibrary, M: int) -> None:
    """Lines are asked for far ahead, at the end of what there is too; the last tile is narrow."""
    p = random_problem(1057, 8200)
    both_modes_agree(native, p, np.random.default_rng(M).standard_normal((M, p.K)).astype(np.float32))


def test_long_rows_stay_accurate(native: KernelLibrary) -> None:
    """K = 16384, all products positive: sums grow to their largest, and so would a naive error."""
    p = random_problem(5, 16384)
    p.codes[:] = 255
    x = np.random.default_rng(0).uniform(0.5, 1.5, (2, 16384)).astype(np.float32)
    both_modes_agree(native, p, x)


def test_lut_mode_is_accurate_on_gaussian_data(native: KernelLibrary) -> None:
    """The promise of LUT mode: about 7e-3 relative error, and no bias."""
    p = random_problem(512, 4096, bias=False, seed=1)
    p.c[:] = 1
    x = np.random.default_rng(1).standard_normal((8, 4096)).astype(np.float32)
    want = p.reference(x)
    error = multiply(native, p, x, exact=False, isa=native.isa()) - want
    assert np.linalg.norm(error) < 9e-3 * np.linalg.norm(want)
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(error.size)


EXTREMES = {
    "huge": lambda rng, shape: rng.standard_normal(shape) * 1e30,
    "largest": lambda rng, shape: np.where(rng.random(shape) < 0.5, -3.4e38, 3.4e38),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-36,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-41,
    "zero": lambda rng, shape: np.zeros(shape),
    "negative zero": lambda rng, shape: np.full(shape, -0.0),
    "one outlier": lambda rng, shape: np.where(np.arange(shape[1]) == shape[1] // 2, 1e20, rng.standard_normal(shape)),
    "all equal": lambda rng, shape: np.full(shape, 1.0),
    "every scale": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.uniform(-37, 30, shape),
}


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("codes", [None, 0, 255])
def test_extreme_activations(native: KernelLibrary, kind: str, codes: int | None) -> None:
    """Nothing overflows on the way where the result does not: |r| is small here, the sums are not."""
    rng = np.random.default_rng(0)
    p = random_problem(40, 600, bias=False, seed=4)
    p.r[:] = rng.uniform(-1e-4, 1e-4, p.N)
    if codes is not None:
        p.codes[:] = codes
    x = EXTREMES[kind](rng, (3, p.K)).astype(np.float32)
    both_modes_agree(native, p, x)


def test_extreme_scales(native: KernelLibrary) -> None:
    """The largest and the smallest float16 values, as scales of both kinds."""
    p = random_problem(64, 300, bias=False, seed=5)
    p.c[:] = np.where(np.arange(p.K) % 2, 65504.0, 6e-8)
    p.r[:] = np.where(np.arange(p.N) % 2, 65504.0, -6e-8)
    for scale in (1e-30, 1.0, 1e25):
        both_modes_agree(native, p, (np.random.default_rng(0).standard_normal((2, p.K)) * scale).astype(np.float32))


def test_a_dead_column_hides_nothing(native: KernelLibrary) -> None:
    """A huge activation under a zero scale leaves the accuracy of the others alone."""
    p = random_problem(32, 256, bias=False, seed=6)
    p.c[:] = 1
    p.c[17] = 0
    x = np.full((1, p.K), 1e-30, np.float32)
    x[0, 17] = 1e30
    both_modes_agree(native, p, x)


@pytest.mark.parametrize("exact", [False, True])
def test_overflow_becomes_infinite(native: KernelLibrary, exact: bool) -> None:
    p = random_problem(3, 300, bias=False)
    p.codes[:] = 255
    p.r[:], p.c[:] = 1, 1
    y = multiply(native, p, np.full((1, p.K), 3e38, np.float32), exact=exact, isa=native.isa())
    assert (y == np.inf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("column", [0, 299])
def test_bad_activations_show(native: KernelLibrary, bad: float, exact: bool, column: int) -> None:
    """A row with an infinity or a NaN is NaN throughout; the rows beside it are untouched."""
    p = random_problem(130, 300, seed=7)
    p.c[column] = 0  # even where the scale is zero
    x = np.random.default_rng(0).standard_normal((3, p.K)).astype(np.float32)
    clean = {isa: multiply(native, p, x, exact=exact, isa=isa) for isa in instruction_sets(native)}
    x[1, column] = bad
    for isa in instruction_sets(native):
        y = multiply(native, p, x, exact=exact, isa=isa)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2]], clean[isa][[0, 2]])


def test_every_byte_of_codes(native: KernelLibrary) -> None:
    """Row n holds byte n, in its first or second place: one-hot activations read single signs."""
    every = np.arange(256, dtype=np.uint8)
    for position in (0, 1):
        codes = np.full((256, 2), 0b01010101, np.uint8)
        codes[:, position] = every
        p = Problem(codes, np.ones(256, np.float16), np.ones(16, np.float16), None)
        x = np.eye(16, dtype=np.float32)
        for isa in instruction_sets(native):
            np.testing.assert_array_equal(multiply(native, p, x, exact=True, isa=isa), p.signs().T)
            np.testing.assert_allclose(multiply(native, p, x, exact=False, isa=isa), p.signs().T, rtol=1e-6)


def test_padding_bits_do_not_count(native: KernelLibrary) -> None:
    p = random_problem(50, 13, seed=8)
    x = np.random.default_rng(0).standard_normal((2, 13)).astype(np.float32)
    for exact in (False, True):
        dirty = Problem(p.codes | np.array([0, 0b11100000], np.uint8), p.r, p.c, p.bias)
        for isa in instruction_sets(native):
            want = multiply(native, p, x, exact=exact, isa=isa)
            np.testing.assert_array_equal(multiply(native, dirty, x, exact=exact, isa=isa), want)


def test_worst_sums_do_not_overflow_int16(native: KernelLibrary) -> None:
    """Every entry picked in a block is +127, or -127: the largest 16-bit sums there are, of one row and of several."""
    for byte, sign in ((255, 1.0), (0, -1.0)):
        p = Problem(np.full((128, 32), byte, np.uint8), np.ones(128, np.float16), np.ones(256, np.float16), None)
        for isa in instruction_sets(native):
            for M in (1, 20):
                y = multiply(native, p, np.ones((M, 256), np.float32), exact=False, isa=isa)
                # Of 256 columns of lut5 16 are in groups of 4, and 4/5 of 127 is not whole.
                whole = M == 1 or plain_set(isa) == "scalar"
                np.testing.assert_allclose(y, np.full((M, 128), sign * 256), rtol=1e-6 if whole else 3e-4)


def table_by_definition(x: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """The byte tables of kernel.h in numpy float32, operation by operation."""
    z = np.zeros(-(-len(x) // 8) * 8, np.float32)
    z[: len(x)] = x * c
    v = z.reshape(-1, 4)
    a = np.abs(v)
    largest = ((a[:, 0] + a[:, 1]) + (a[:, 2] + a[:, 3])).max()
    if largest < np.float32(2.0**-100):
        return np.full((len(v), 16), 128, np.uint8), np.float32(0)
    index = np.arange(16)
    s = [np.where(index >> j & 1, v[:, j : j + 1], -v[:, j : j + 1]) for j in range(4)]
    units = np.rint(((s[0] + s[1]) + (s[2] + s[3])) * (np.float32(127) / largest))
    return (128 + units).astype(np.uint8), np.float32(largest / np.float32(127))


@settings(deadline=None, max_examples=60)
@given(K=st.integers(1, BLOCK), power=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_tables_follow_their_definition(native: KernelLibrary, K: int, power: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(K) * 2.0**power).astype(np.float32)
    c = rng.choice(np.array([0.0, 0.5, 1.25], np.float32), K)
    want, want_scale = table_by_definition(x, c)
    for isa in instruction_sets(native):
        table, scale = np.empty_like(want), ctypes.c_float()
        pointer = ctypes.c_void_p
        build = native.handle.lit_binq_build_lut
        build.argtypes = [ctypes.c_char_p, pointer, pointer, ctypes.c_int64, pointer, pointer]
        build(isa.encode(), x.ctypes.data, c.ctypes.data, K, table.ctypes.data, ctypes.byref(scale))
        np.testing.assert_array_equal(table, want)
        assert scale.value == want_scale


def lut5_by_definition(x: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """The byte lut5 tables in numpy, from the words of kernel.h: (groups, 16)."""
    halves = 2 * -(-len(x) // 32)
    z = np.zeros(16 * halves, np.float32)
    z[: len(x)] = x * c
    # [half][byte][4]: of a quad the low nibbles of its 4 bytes, then the high ones
    nibbles = z.reshape(-1, 4, 2, 4).transpose(0, 2, 1, 3).reshape(halves, 4, 4)
    signs = halves // 5
    kept, fifth = nibbles[: halves - signs], np.zeros((halves - signs, 4), np.float32)
    for half in range(4 * signs):  # bit e of the nibbles of the a-th half of signs, for half 4 a + e
        fifth[half] = nibbles[halves - signs + half // 4, :, half % 4]
    v, f = kept.reshape(-1, 4), fifth.reshape(-1, 1)
    a = np.abs(v)
    largest = (((a[:, 0] + a[:, 1]) + (a[:, 2] + a[:, 3])) + np.abs(f[:, 0])).max()
    if largest < np.float32(2.0**-100):
        return np.full((len(v), 16), 128, np.uint8), np.float32(0)
    units = np.float32(127 * 256) / largest
    q, last = np.rint(v * units).astype(np.int64), np.rint(f * units).astype(np.int64)
    index = np.arange(16)
    sums = last + sum(np.where(index >> j & 1, q[:, j : j + 1], -q[:, j : j + 1]) for j in range(4))
    return (128 + ((sums + 128) >> 8)).astype(np.uint8), np.float32(largest / np.float32(127))


@settings(deadline=None, max_examples=60)
@given(K=st.integers(1, BLOCK), power=st.integers(-30, 30), seed=st.integers(0, 2**31))
@example(K=256, power=0, seed=0)
@example(K=128, power=-120, seed=0)  # counts as zero
def test_lut5_tables_follow_their_definition(native: KernelLibrary, K: int, power: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(K) * 2.0**power).astype(np.float32)
    c = rng.choice(np.array([0.0, 0.5, 1.25], np.float32), K)
    want, want_scale = lut5_by_definition(x, c)
    build, pointer = native.handle.lit_binq_build_lut5, ctypes.c_void_p
    build.argtypes = [ctypes.c_char_p, pointer, pointer, ctypes.c_int64, pointer, pointer]
    for isa in instruction_sets(native):
        table, scale = np.empty_like(want), ctypes.c_float()
        status = build(isa.encode(), x.ctypes.data, c.ctypes.data, K, table.ctypes.data, ctypes.byref(scale))
        assert status == (0 if plain_set(isa) == "scalar-lut5" else -1)
        if status == 0:
            np.testing.assert_array_equal(table, want)
            assert scale.value == want_scale


@pytest.mark.parametrize("M", [1, 2, 128, 129, 140])
def test_rows_of_a_call_are_rounded_alike(native: KernelLibrary, M: int) -> None:
    """A row's result does not depend on its neighbours, only on whether it has any in its panel of 128."""
    p, x = random_problem(40, 300), np.random.default_rng(0).standard_normal((M, 300)).astype(np.float32)
    y = multiply(native, p, x, exact=False, isa=native.isa())
    for first in range(0, M, 128):
        rows = x[first : first + 128]
        reversed_rows = multiply(native, p, rows[::-1], exact=False, isa=native.isa())[::-1]
        np.testing.assert_array_equal(y[first : first + 128], reversed_rows)


def test_float16_conversion_is_exact(native: KernelLibrary) -> None:
    """All 65536 bit patterns, subnormals, infinities and NaN among them."""
    convert = native.handle.lit_binq_half_to_float
    convert.argtypes, convert.restype = [ctypes.c_uint16], ctypes.c_float
    bits = np.arange(65536, dtype=np.uint16)
    got = np.array([convert(int(b)) for b in bits], np.float32)
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))
