"""NormBinaryMatMulQKV and NormBinaryGatedMLP: bit for bit their norm and linears one by one, natively and as bodies.

Legend: as in native.py; H the rows of gate and up; x the normalized rows of hidden and skip.
"""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import Problem, instruction_sets, multiply, random_problem, require_native, session
from onnx import TensorProto, helper, numpy_helper

from lit_binq_onnx.functions import add_functions
from lit_binq_onnx.library import NativeLibrary

LEVELS = [
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
INLINED: dict[str, str] = {}
EPSILON = 1e-5
NOT_INLINED_AHEAD = {"session.disable_aot_function_inlining": "1"}


@pytest.fixture(scope="module")
def native() -> NativeLibrary:
    return require_native()


def gamma(K: int) -> np.ndarray:
    """(K,) float32, with a zero where there is room for one."""
    made = np.random.default_rng(K).uniform(0.5, 1.5, K).astype(np.float32)
    made[K // 2 : K // 2 + K // 30] = 0
    return made


def skip_for(hidden: np.ndarray) -> np.ndarray:
    """Something of the same shape, for tests that need not know what is added; each row depends on its own only."""
    return np.ascontiguousarray(hidden[..., ::-1]) * np.float32(0.5)


def normalized(
    native: NativeLibrary, hidden: np.ndarray, skip: np.ndarray, weight: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """(sum, x) of rows (M, K), as the native operators compute them."""
    call, pointer = native.handle.lit_binq_normalize, ctypes.c_void_p
    call.argtypes = [pointer] * 3 + [ctypes.c_float, ctypes.c_int64, ctypes.c_int64] + [pointer] * 2
    arrays = [np.ascontiguousarray(a, np.float32) for a in (hidden, skip, weight)]
    total, x = (np.full(hidden.shape, 12345.0, np.float32) for _ in range(2))
    call(*(a.ctypes.data for a in arrays), epsilon, *hidden.shape, total.ctypes.data, x.ctypes.data)
    return total, x


def rows_of(native: NativeLibrary, hidden: np.ndarray) -> np.ndarray:
    """x (M, K) in the models here."""
    return normalized(native, hidden, skip_for(hidden), gamma(hidden.shape[1]), EPSILON)[1]


def float64_norm(total: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x in float64, of a sum in float32."""
    s = total.astype(np.float64)
    x: np.ndarray = s / np.sqrt((s * s).mean(-1, keepdims=True) + np.float64(np.float32(epsilon))) * weight
    return x


def activations(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    kind: str,
    problems: list[Problem],
    x_shape: list[int | str | None] | None,
    *,
    exact: int | None = None,
    inputs: tuple[str, ...] = (),
    body: bool = False,
    one_skip: bool = False,
    **attributes: float,
) -> onnx.ModelProto:
    """hidden, skip -> one fused operator -> Y, sum.

    Tensors named in `inputs` are graph inputs instead of initializers; with `one_skip` skip is (K,).
    """
    suffixes = ("q", "k", "v") if kind == "NormBinaryMatMulQKV" else ("gate", "up", "down")
    tensors: dict[str, np.ndarray | None] = {"gamma": gamma(problems[0].K)}
    for suffix, p in zip(suffixes, problems, strict=True):
        tensors |= {f"codes_{suffix}": p.codes, f"row_scale_{suffix}": p.r, f"col_scale_{suffix}": p.c}
    if kind == "NormBinaryMatMulQKV":
        tensors |= {f"bias_{suffix}": p.bias for suffix, p in zip(suffixes, problems, strict=True)}
    sizes = {"K": problems[0].K} | ({"H": problems[0].N} if kind == "NormBinaryGatedMLP" else {})
    attributes = {**sizes, "epsilon": EPSILON, **attributes}
    attributes |= {} if exact is None else {"exact": exact}
    names = [name if value is not None else "" for name, value in tensors.items()]
    while not names[-1]:
        names.pop()
    given_tensors = {name: value for name, value in tensors.items() if value is not None}
    graph_inputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, x_shape),
        helper.make_tensor_value_info("skip", TensorProto.FLOAT, [problems[0].K] if one_skip else x_shape),
    ]
    unknown = None if x_shape is None else [None] * len(x_shape)
    for name in inputs:
        kind_of = helper.np_dtype_to_tensor_dtype(given_tensors[name].dtype)
        graph_inputs.append(helper.make_tensor_value_info(name, kind_of, given_tensors[name].shape))
    graph = helper.make_graph(
        [helper.make_node(kind, ["hidden", "skip", *names], ["Y", "sum"], "fused", domain="lit_binq", **attributes)],
        "one_node",
        graph_inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, unknown) for name in ("Y", "sum")],
        [numpy_helper.from_array(value, name) for name, value in given_tensors.items() if name not in inputs],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        add_functions(made)
    return made


def attention(sizes: tuple[int, int, int], K: int, *, bias: bool = True, seed: int = 0) -> list[Problem]:
    """q, k and v."""
    return [random_problem(N, K, bias=bias, seed=seed + i) for i, N in enumerate(sizes)]


def mlp(K: int, H: int, N: int, *, seed: int = 0) -> list[Problem]:
    """gate, up and down."""
    shapes = ((H, K), (H, K), (N, H))
    return [random_problem(n, k, bias=False, seed=seed + i) for i, (n, k) in enumerate(shapes)]


def one_by_one(
    native: NativeLibrary, problems: list[Problem], hidden: np.ndarray, *, exact: bool, isa: str
) -> np.ndarray:
    """[Q, K, V] from a norm and three multiplications."""
    x = rows_of(native, hidden)
    return np.concatenate([multiply(native, p, x, exact=exact, isa=isa) for p in problems], axis=1)


def apply_gate(native: NativeLibrary, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up as the native operator computes it."""
    call = native.handle.lit_binq_apply_gate
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    opened, up = np.array(gate, np.float32), np.ascontiguousarray(up, np.float32)
    call(opened.ctypes.data, up.ctypes.data, opened.size)
    return opened


def mlp_one_by_one(
    native: NativeLibrary, problems: list[Problem], hidden: np.ndarray, *, exact: bool, isa: str
) -> np.ndarray:
    """A norm, three multiplications and the gate between them."""
    gate, up, down = problems
    x = rows_of(native, hidden)
    opened = apply_gate(
        native, multiply(native, gate, x, exact=exact, isa=isa), multiply(native, up, x, exact=exact, isa=isa)
    )
    return multiply(native, down, opened, exact=exact, isa=isa)


def feeds(hidden: np.ndarray) -> dict[str, np.ndarray]:
    return {"hidden": hidden, "skip": skip_for(hidden)}


def run(made: onnx.ModelProto, native: NativeLibrary | None, hidden: np.ndarray, threads: int = 1) -> np.ndarray:
    """Y, after a look at the other output."""
    y, total = session(made, native, threads=threads).run(None, feeds(hidden))
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(total, hidden + skip_for(hidden))
    return y


# --- bit for bit the linears one by one


@pytest.mark.parametrize("M", [1, 2, 5, 16, 17, 64, 65, 200, 512])
@pytest.mark.parametrize("exact", [0, 1])
def test_any_number_of_rows(native: NativeLibrary, M: int, exact: int) -> None:
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
    native: NativeLibrary, M: int, K: int, sizes: tuple[int, int, int], exact: bool, bias: bool, seed: int
) -> None:
    x, best = activations(M, K, seed=seed), native.isa()
    heads, parts = attention(sizes, K, bias=bias, seed=seed), mlp(K, sizes[0], sizes[1], seed=seed)
    for isa in instruction_sets(native):
        native.force_isa(isa)
        try:
            got = run(model("NormBinaryMatMulQKV", heads, [M, K], exact=int(exact)), native, x)
            gated = run(model("NormBinaryGatedMLP", parts, [M, K], exact=int(exact)), native, x)
        finally:
            native.force_isa(best)
        np.testing.assert_array_equal(got, one_by_one(native, heads, x, exact=exact, isa=best))
        np.testing.assert_array_equal(gated, mlp_one_by_one(native, parts, x, exact=exact, isa=best))


@pytest.mark.parametrize("dead", list(product([False, True], repeat=3)))
def test_dead_columns_of_one_linear_are_alive_for_another(native: NativeLibrary, dead: tuple[bool, ...]) -> None:
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
def test_any_of_the_biases_may_be_absent(native: NativeLibrary, given_biases: tuple[bool, ...]) -> None:
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
def test_threads_change_nothing(native: NativeLibrary, M: int, exact: int) -> None:
    """Sizes above the grain of multiply.cpp, so that two threads do share the work."""
    x = activations(M, 5000)
    for made in (
        model("NormBinaryMatMulQKV", attention((700, 300, 300), 5000), [M, 5000], exact=exact),
        model("NormBinaryGatedMLP", mlp(5000, 1100, 700), [M, 5000], exact=exact),
    ):
        np.testing.assert_array_equal(run(made, native, x), run(made, native, x, threads=2))


def test_one_session_serves_many_threads(native: NativeLibrary) -> None:
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
def test_the_norm_equals_float64(native: NativeLibrary, M: int, K: int, power: int, epsilon: float, seed: int) -> None:
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


def test_the_norm_of_extremes(native: NativeLibrary) -> None:
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
def test_one_skip_for_all_rows(native: NativeLibrary, kind: str, M: int, exact: int) -> None:
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
        stock, stock_total = session(made, None).run(None, {"hidden": hidden, "skip": skip})
        np.testing.assert_array_equal(stock_total, total)
        assert stock.shape == y.shape
        if M and exact:
            np.testing.assert_allclose(stock, y, atol=1e-5 * np.abs(stock).max(), rtol=0)


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
def test_bad_activations_show(native: NativeLibrary, bad: float, exact: int) -> None:
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


def test_the_gate_is_silu(native: NativeLibrary) -> None:
    """All magnitudes of both signs, against float64, and equal bits on every instruction set."""
    powers = (2.0 ** np.arange(-149, 120, 0.125)).astype(np.float32)
    g = np.concatenate([np.linspace(-87, 87, 100_001, dtype=np.float32), powers, -powers, np.zeros(1, np.float32)])
    up = np.random.default_rng(0).standard_normal(len(g)).astype(np.float32)
    results = []
    best = native.isa()
    try:
        for isa in instruction_sets(native):
            native.force_isa(isa)
            results.append(apply_gate(native, g, up))
    finally:
        native.force_isa(best)
    with np.errstate(over="ignore"):
        want = g.astype(np.float64) / (1 + np.exp(-g.astype(np.float64))) * up
    np.testing.assert_allclose(results[0], want, rtol=5e-7, atol=1e-35)
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.int32), results[0].view(np.int32))


def test_the_gate_of_infinities_and_nan(native: NativeLibrary) -> None:
    g = np.array([np.inf, -np.inf, np.nan, -3e38, 3e38, 1.0, 1.0], np.float32)
    up = np.array([1, 1, 1, 1, 1, np.nan, np.inf], np.float32)
    want = np.array([np.inf, np.nan, np.nan, 0, 3e38, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(apply_gate(native, g, up), want)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e4])
def test_the_mlp_in_exact_mode_equals_float64(native: NativeLibrary, scale: float) -> None:
    gate, up, down = parts = mlp(300, 500, 60)
    x = activations(5, 300) * np.float32(scale)
    normed = float64_norm(x + skip_for(x), gamma(300), EPSILON).astype(np.float32)
    g, u = gate.reference(normed), up.reference(normed)
    with np.errstate(over="ignore"):
        h = g / (1 + np.exp(-g)) * u
    got = run(model("NormBinaryGatedMLP", parts, [5, 300], exact=1), native, x)
    np.testing.assert_allclose(got, down.reference(h), atol=1e-5 * down.magnitude(h).max(), rtol=0)
    stock = run(model("NormBinaryGatedMLP", parts, [5, 300], body=True), None, x)
    np.testing.assert_allclose(stock, got, atol=1e-5 * down.magnitude(h).max(), rtol=0)


# --- in the runtime


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", [INLINED, NOT_INLINED_AHEAD])
def test_body_and_native_operator_in_one_file(
    native: NativeLibrary, level: ort.GraphOptimizationLevel, config: dict[str, str]
) -> None:
    """Bodies call BinaryMatMul, whose body the model carries too; the native operator wins over all of them."""
    for made in (
        model("NormBinaryMatMulQKV", attention((16, 8, 8), 37), ["b", "s", 37], body=True),
        model("NormBinaryGatedMLP", mlp(37, 48, 24), ["b", "s", 37], body=True),
    ):
        onnx.checker.check_model(made, full_check=True)
        x, before = activations(2, 5, 37), native.calls()
        stock = session(made, None, level=level, config=config).run(None, feeds(x))[0]
        assert native.calls() == before
        with native.force_mode("exact"):
            exact = session(made, native, level=level, config=config).run(None, feeds(x))[0]
        assert native.calls() == before + 3
        lut = session(made, native, level=level, config=config).run(None, feeds(x))[0]
        assert exact.shape == stock.shape == (2, 5, 24 if made.graph.node[0].op_type == "NormBinaryGatedMLP" else 32)
        np.testing.assert_allclose(exact, stock, atol=1e-5 * np.abs(stock).max())
        assert 1e-4 < np.abs(lut - stock).max() / np.abs(stock).max() < 0.1


@pytest.mark.parametrize("kind", ["NormBinaryMatMulQKV", "NormBinaryGatedMLP"])
def test_natively_one_node_runs(native: NativeLibrary, kind: str, tmp_path: Path) -> None:
    """Inlined, the body would give the same numbers with more nodes."""
    problems = attention((16, 8, 8), 37) if kind == "NormBinaryMatMulQKV" else mlp(37, 48, 24)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.path))
    made = model(kind, problems, ["M", 37], body=True)
    ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == [kind]


def test_adding_bodies_twice_changes_nothing() -> None:
    made = model("NormBinaryGatedMLP", mlp(8, 8, 8), ["M", 8], body=True)
    assert [f.name for f in made.functions] == ["BinaryMatMul", "NormBinaryGatedMLP"]
    once = made.SerializeToString(deterministic=True)
    add_functions(made)
    assert made.SerializeToString(deterministic=True) == once


def test_dynamic_dimensions_keep_their_names(native: NativeLibrary) -> None:
    for made, rows in (
        (model("NormBinaryMatMulQKV", attention((16, 8, 4), 37), ["batch", "sequence", 37]), 28),
        (model("NormBinaryGatedMLP", mlp(37, 48, 24), ["batch", "sequence", 37]), 24),
    ):
        s = session(made, native)
        assert [o.shape for o in s.get_outputs()] == [["batch", "sequence", rows], ["batch", "sequence", 37]]
        assert s.run(None, feeds(activations(2, 0, 37)))[0].shape == (2, 0, rows)


# --- errors


def with_gamma(made: onnx.ModelProto, weight: np.ndarray) -> onnx.ModelProto:
    next(t for t in made.graph.initializer if t.name == "gamma").CopyFrom(numpy_helper.from_array(weight, "gamma"))
    return made


def test_tensors_that_do_not_fit(native: NativeLibrary) -> None:
    heads = attention((16, 8, 8), 37)
    with pytest.raises(Exception, match=r"QKV: codes_q has shape \(16, 5\), expected \(N, 6\) for attribute K = 41"):
        session(with_gamma(model("NormBinaryMatMulQKV", heads, None, K=41), gamma(41)), native)
    heads[1] = random_problem(8, 20)
    with pytest.raises(Exception, match=r"QKV: codes_k has shape \(8, 3\), expected \(N, 5\) for attribute K = 37"):
        session(model("NormBinaryMatMulQKV", heads, None), native)
    parts = mlp(37, 48, 24)
    with pytest.raises(Exception, match=r"MLP: codes_down has shape \(24, 6\), expected \(N, 5\) for attribute H = 40"):
        session(model("NormBinaryGatedMLP", parts, None, H=40), native)
    parts[1] = random_problem(47, 37)
    with pytest.raises(Exception, match="NormBinaryGatedMLP: codes_up has 47 rows, expected 48 as attribute H says"):
        session(model("NormBinaryGatedMLP", parts, None), native)
    parts = mlp(37, 48, 24)
    with pytest.raises(Exception, match=r"NormBinaryGatedMLP: gamma has shape \(36,\), expected \(37,\)"):
        session(with_gamma(model("NormBinaryGatedMLP", parts, None), gamma(36)), native)
    parts[2].r[3] = np.inf
    with pytest.raises(Exception, match=r"NormBinaryGatedMLP: row_scale_down\[3\] is not finite"):
        session(model("NormBinaryGatedMLP", parts, None), native)


def test_attributes_that_do_not_fit(native: NativeLibrary) -> None:
    with pytest.raises(Exception, match="NormBinaryMatMulQKV: attribute exact is 2, expected 0 or 1"):
        session(model("NormBinaryMatMulQKV", attention((16, 8, 8), 37), None, exact=2), native)
    for name, meaning in (("H", "the rows of gate and up"), ("epsilon", "what the norm adds to the mean of squares")):
        made = model("NormBinaryGatedMLP", mlp(37, 48, 24), None)
        made.graph.node[0].attribute.remove(next(a for a in made.graph.node[0].attribute if a.name == name))
        with pytest.raises(Exception, match=f"NormBinaryGatedMLP: attribute {name} is missing, expected {meaning}"):
            session(made, native)
    for bad in (-1e-5, np.nan, np.inf):
        with pytest.raises(Exception, match=r"attribute epsilon is .*, expected a finite number of at least 0"):
            session(model("NormBinaryGatedMLP", mlp(37, 48, 24), None, epsilon=float(bad)), native)


@pytest.mark.parametrize("name", ["gamma", "codes_v", "row_scale_k", "col_scale_q"])
def test_weights_that_are_not_constant(native: NativeLibrary, name: str) -> None:
    with pytest.raises(Exception, match=f"QKV: {name} is computed at run time .* expected a constant"):
        session(model("NormBinaryMatMulQKV", attention((16, 8, 8), 37), None, inputs=(name,)), native)


def test_inputs_that_do_not_fit_at_run_time(native: NativeLibrary) -> None:
    heads = attention((16, 8, 8), 37)
    s, before = session(model("NormBinaryMatMulQKV", heads, None), native), native.calls()
    with pytest.raises(Exception, match=r"QKV: hidden has shape \(2, 36\), expected \(..., 37\)"):
        s.run(None, feeds(activations(2, 36)))
    s = session(model("NormBinaryGatedMLP", mlp(37, 48, 24), None), native)
    with pytest.raises(Exception, match=r"NormBinaryGatedMLP: hidden has shape \(2, 38\), expected \(..., 37\)"):
        s.run(None, feeds(activations(2, 38)))
    for shape in ((1, 37), (36,), (2, 1, 37), (37, 2)):
        wanted = r"expected \(2, 37\) as hidden, or \(37,\)"
        with pytest.raises(Exception, match=rf"MLP: skip has shape {re.escape(str(shape))}, {wanted}"):
            s.run(None, {"hidden": activations(2, 37), "skip": activations(*shape)})
    heads[2].bias = heads[2].bias[:7]
    with pytest.raises(Exception, match=r"QKV: bias_v has shape \(7,\), expected \(8,\)"):
        run(model("NormBinaryMatMulQKV", heads, None), native, activations(2, 37))
    assert native.calls() == before
