"""NormBinaryMatMulQKV and NormBinaryGatedMLP: bit for bit their norm and linears one by one; their extremes."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_problems import (
    EPSILON,
    activations,
    apply_gate,
    attention,
    feeds,
    float64_norm,
    gamma,
    mlp,
    mlp_one_by_one,
    model,
    normalized,
    one_by_one,
    rows_of,
    run,
    skip_for,
)
from native import KernelLibrary, instruction_sets, require_kernels, session


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


# --- bit for bit the linears one by one


@pytest.mark.parametrize("M", [1, 2, 5, 16, 17, 128, 129, 200, 512])
@pytest.mark.parametrize("exact", [0, 1])
def test_any_number_of_rows(native: KernelLibrary, M: int, exact: int) -> None:
    """Rows up to several panels of multiply.cpp, with a rest."""
    x, heads, parts = activations(M, 300), attention((129, 40, 33), 300), mlp(300, 270, 130)
    before = native.calls()
    got = run(model("NormBinaryMatMulQKV", heads, ["M", 300], exact=exact), native, x)
    np.testing.assert_array_equal(got, one_by_one(native, heads, x, exact=exact == 1, isa=native.isa()))
    got = run(model("NormBinaryGatedMLP", parts, ["M", 300], exact=exact), native, x)
    np.testing.assert_array_equal(got, mlp_one_by_one(native, parts, x, exact=exact == 1, isa=native.isa()))
    assert native.calls() == before + 6


@settings(deadline=None, max_examples=40)
@given(
    M=st.integers(0, 70),
    K=st.integers(1, 600),
    sizes=st.tuples(*[st.integers(1, 300)] * 3),
    exact=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    native: KernelLibrary, M: int, K: int, sizes: tuple[int, int, int], exact: bool, bias: bool, seed: int
) -> None:
    x = activations(M, K, seed=seed)
    heads, parts = attention(sizes, K, bias=bias, seed=seed), mlp(K, sizes[0], sizes[1], seed=seed)
    for isa in instruction_sets(native):
        got = run(model("NormBinaryMatMulQKV", heads, [M, K], exact=int(exact)), native.on(isa), x)
        gated = run(model("NormBinaryGatedMLP", parts, [M, K], exact=int(exact)), native.on(isa), x)
        np.testing.assert_array_equal(got, one_by_one(native, heads, x, exact=exact, isa=isa))
        np.testing.assert_array_equal(gated, mlp_one_by_one(native, parts, x, exact=exact, isa=isa))


@pytest.mark.parametrize("dead", list(product([False, True], repeat=3)))
def test_dead_columns_of_one_linear_are_alive_for_another(native: KernelLibrary, dead: tuple[bool, ...]) -> None:
    """A huge activation that only some column scales switch off: rows are scaled for every linear by itself."""
    problems = attention((40, 50, 60), 256, bias=False)
    for p, off in zip(problems, dead, strict=True):
        p.c[:] = 1
        p.c[17] = 0 if off else 1
    x = activations(3, 256) * np.float32(1e-20)
    x[:, 17] = 1e10
    x[:, 255 - 17] = -0.5e10  # so that skip_for leaves one huge sum
    for exact in (False, True):
        got = run(model("NormBinaryMatMulQKV", problems, [3, 256], exact=int(exact)), native, x)
        np.testing.assert_array_equal(got, one_by_one(native, problems, x, exact=exact, isa=native.isa()))
    small = np.abs(got[:, :40]).max() < 1e-20
    assert small == dead[0]


@pytest.mark.parametrize("given_biases", list(product([False, True], repeat=3)))
def test_any_of_the_biases_may_be_absent(native: KernelLibrary, given_biases: tuple[bool, ...]) -> None:
    problems, x = attention((19, 8, 9), 37), activations(2, 3, 37)
    for p, bias in zip(problems, given_biases, strict=True):
        p.bias = p.bias if bias else None
    want = one_by_one(native, problems, x.reshape(6, 37), exact=False, isa=native.isa())
    if given_biases == tuple(sorted(given_biases, reverse=True)) or not ort.__version__.startswith("1.18."):
        # 1.18 crashes where a custom operator lacks an input before another; no export has such a node
        got = run(model("NormBinaryMatMulQKV", problems, None), native, x)
        np.testing.assert_array_equal(got.reshape(6, 36), want)
    y = run(model("NormBinaryMatMulQKV", problems, ["b", "s", 37], body=True), None, x).reshape(6, 36)
    reference = np.concatenate([p.reference(rows_of(native, x.reshape(6, 37))) for p in problems], 1)
    np.testing.assert_allclose(y, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("exact", [0, 1])
def test_threads_change_nothing(native: KernelLibrary, M: int, exact: int) -> None:
    """Sizes above the grain of multiply.cpp, so that two threads do share the work."""
    x = activations(M, 5000)
    for made in (
        model("NormBinaryMatMulQKV", attention((700, 300, 300), 5000), [M, 5000], exact=exact),
        model("NormBinaryGatedMLP", mlp(5000, 1100, 700), [M, 5000], exact=exact),
    ):
        np.testing.assert_array_equal(run(made, native, x), run(made, native, x, threads=2))


def test_one_session_serves_many_threads(native: KernelLibrary) -> None:
    parts = mlp(300, 700, 200)
    s = session(model("NormBinaryGatedMLP", parts, ["M", 300]), native, threads=2)
    inputs = [activations(1 + i % 70, 300, seed=i) for i in range(24)]
    want = [s.run(None, feeds(x))[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: s.run(None, feeds(x))[0], inputs * 2))
    for y, expected in zip(got, want * 2, strict=True):
        np.testing.assert_array_equal(y, expected)


# --- the norm


@settings(deadline=None, max_examples=60)
@given(
    M=st.sampled_from([0, 1, 3, 17, 200]),
    K=st.one_of(st.integers(1, 40), st.sampled_from([255, 576, 1000])),
    power=st.integers(-149, 120),
    epsilon=st.sampled_from([0.0, 1e-12, 1e-6, 1e-5]),
    seed=st.integers(0, 2**31),
)
def test_the_norm_equals_float64(native: KernelLibrary, M: int, K: int, power: int, epsilon: float, seed: int) -> None:
    """Sums are float32's own; x is near what float64 gives for them, where squares leave float32's range too."""
    hidden, skip = (np.ldexp(activations(M, K, seed=seed + i), power).astype(np.float32) for i in range(2))
    weight = gamma(K)
    total, x = normalized(native, hidden, skip, weight, epsilon)
    np.testing.assert_array_equal(total, hidden + skip)
    # Without an epsilon the reciprocal of a row of subnormals is no float.
    alive = np.sqrt((total.astype(np.float64) ** 2).mean(1)) > (0 if epsilon > 0 else 1e-37)
    want = float64_norm(total[alive], weight, epsilon)
    np.testing.assert_allclose(x[alive], want, rtol=3e-7, atol=1e-37)
    zero = x[~total.any(1)] if epsilon > 0 else x[:0]
    np.testing.assert_array_equal(zero, np.zeros_like(zero))


def test_the_norm_of_extremes(native: KernelLibrary) -> None:
    """The largest floats, the smallest, one large among small ones, zeros."""
    K, weight = 37, np.linspace(-1, 2, 37).astype(np.float32)
    rows = np.zeros((6, K), np.float32)
    rows[0], rows[1], rows[2, 5], rows[3] = 3.4e38, 1e-45, -3.4e38, 1e-20
    rows[3, 30] = rows[4, 7] = 1e30
    _, x = normalized(native, rows, np.zeros_like(rows), weight, 1e-6)
    np.testing.assert_allclose(x, float64_norm(rows, weight, 1e-6), rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(x[5], np.zeros(K))


@pytest.mark.parametrize("kind", ["NormBinaryMatMulQKV", "NormBinaryGatedMLP"])
@pytest.mark.parametrize("M", [0, 1, 3, 17, 200])
@pytest.mark.parametrize("exact", [0, 1])
def test_one_skip_for_all_rows(native: KernelLibrary, kind: str, M: int, exact: int) -> None:
    """What a first block has: nothing to add; any other row does too. Body and operator."""
    problems = attention((40, 9, 33), 100) if kind == "NormBinaryMatMulQKV" else mlp(100, 70, 33)
    made = model(kind, problems, ["M", 100], exact=exact, one_skip=True, body=True)
    full, hidden = model(kind, problems, ["M", 100], exact=exact), activations(M, 100)
    for skip in (np.zeros(100, np.float32), activations(100, seed=1)):
        y, total = session(made, native).run(None, {"hidden": hidden, "skip": skip})
        repeated = np.tile(skip, (M, 1))
        want, _ = session(full, native).run(None, {"hidden": hidden, "skip": repeated})
        np.testing.assert_array_equal(total, hidden + skip)
        np.testing.assert_array_equal(y, want)
        unmodified, unmodified_total = session(made, None).run(None, {"hidden": hidden, "skip": skip})
        np.testing.assert_array_equal(unmodified_total, total)
        assert unmodified.shape == y.shape
        if M and exact:
            np.testing.assert_allclose(unmodified, y, atol=1e-5 * np.abs(unmodified).max(), rtol=0)


@pytest.mark.parametrize("kind", ["NormBinaryMatMulQKV", "NormBinaryGatedMLP"])
def test_without_the_library_the_norm_is_one_node(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime finds its own operator in the body."""
    problems = attention((16, 8, 8), 37) if kind == "NormBinaryMatMulQKV" else mlp(37, 48, 24)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    made = model(kind, problems, ["b", "s", 37], body=True)
    ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("SimplifiedLayerNormalization") == 1
    assert not {"Pow", "ReduceMean", "Sqrt", "Div"} & set(kinds)


# --- extremes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("exact", [0, 1])
def test_bad_activations_show(native: KernelLibrary, bad: float, exact: int) -> None:
    """A row with an infinity or a NaN is NaN throughout, but for its sum; the rows beside it are untouched."""
    heads, parts, x = attention((40, 9, 200), 300), mlp(300, 150, 140), activations(3, 300)
    for made in (
        model("NormBinaryMatMulQKV", heads, [3, 300], exact=exact),
        model("NormBinaryGatedMLP", parts, [3, 300], exact=exact),
    ):
        clean = run(made, native, x)
        dirty = x.copy()
        dirty[1, 299] = bad
        y = run(made, native, dirty)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])


def test_the_gate_is_silu(native: KernelLibrary) -> None:
    """All magnitudes of both signs, against float64, and equal bits on every instruction set."""
    powers = (2.0 ** np.arange(-149, 120, 0.125)).astype(np.float32)
    g = np.concatenate([np.linspace(-87, 87, 100_001, dtype=np.float32), powers, -powers, np.zeros(1, np.float32)])
    up = np.random.default_rng(0).standard_normal(len(g)).astype(np.float32)
    results = [apply_gate(native.on(isa), g, up) for isa in instruction_sets(native)]
    with np.errstate(over="ignore"):
        want = g.astype(np.float64) / (1 + np.exp(-g.astype(np.float64))) * up
    np.testing.assert_allclose(results[0], want, rtol=5e-7, atol=1e-35)
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.int32), results[0].view(np.int32))


def test_the_gate_of_infinities_and_nan(native: KernelLibrary) -> None:
    g = np.array([np.inf, -np.inf, np.nan, -3e38, 3e38, 1.0, 1.0], np.float32)
    up = np.array([1, 1, 1, 1, 1, np.nan, np.inf], np.float32)
    want = np.array([np.inf, np.nan, np.nan, 0, 3e38, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(apply_gate(native, g, up), want)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e4])
def test_the_mlp_in_exact_mode_equals_float64(native: KernelLibrary, scale: float) -> None:
    gate, up, down = parts = mlp(300, 500, 60)
    x = activations(5, 300) * np.float32(scale)
    normed = float64_norm(x + skip_for(x), gamma(300), EPSILON).astype(np.float32)
    g, u = gate.reference(normed), up.reference(normed)
    with np.errstate(over="ignore"):
        h = g / (1 + np.exp(-g)) * u
    got = run(model("NormBinaryGatedMLP", parts, [5, 300], exact=1), native, x)
    np.testing.assert_allclose(got, down.reference(h), atol=1e-5 * down.magnitude(h).max(), rtol=0)
    unmodified = run(model("NormBinaryGatedMLP", parts, [5, 300], body=True), None, x)
    np.testing.assert_allclose(unmodified, got, atol=1e-5 * down.magnitude(h).max(), rtol=0)
