"""The native operator inside ONNX Runtime: shapes, bias, modes, threads, shape inference, errors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

from native import (
    KernelLibrary,
    instruction_sets,
    multiply,
    one_node_model,
    plain_results,
    random_problem,
    require_kernels,
    session,
)


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


def activations(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(37,), (1, 37), (5, 37), (2, 3, 37), (2, 1, 2, 37), (0, 37), (2, 0, 37)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("exact", [None, 0, 1])
def test_any_rank(native: KernelLibrary, shape: tuple[int, ...], bias: bool, exact: int | None) -> None:
    p = random_problem(19, 37, bias=bias)
    x = activations(shape)
    before = native.calls()
    y = session(one_node_model(p, [*shape], exact=exact), native).run(None, {"X": x})[0]
    assert native.calls() == before + 1
    assert y.shape == (*shape[:-1], 19)
    want = multiply(native, p, x.reshape(-1, 37), exact=exact == 1, isa=native.isa())
    np.testing.assert_array_equal(y.reshape(-1, 19), want)


def test_dynamic_dimensions_keep_their_names(native: KernelLibrary) -> None:
    """Shape inference sees (batch, sequence, N), and one session takes any size."""
    p = random_problem(24, 64)
    s = session(one_node_model(p, ["batch", "sequence", 64]), native)
    assert s.get_outputs()[0].shape == ["batch", "sequence", 24]
    for shape in ((1, 1, 64), (3, 2, 64), (1, 50, 64)):
        x = activations(shape)
        want = multiply(native, p, x.reshape(-1, 64), exact=False, isa=native.isa()).reshape(*shape[:-1], 24)
        np.testing.assert_array_equal(s.run(None, {"X": x})[0], want)


@pytest.mark.parametrize("x_shape", [None, [None, 64], ["batch", None]])
def test_unknown_dimensions_run(native: KernelLibrary, x_shape: list[int | str | None] | None) -> None:
    p = random_problem(24, 64)
    x = activations((3, 64))
    y = session(one_node_model(p, x_shape), native).run(None, {"X": x})[0]
    np.testing.assert_array_equal(y, multiply(native, p, x, exact=False, isa=native.isa()))


def test_bias_may_be_computed(native: KernelLibrary) -> None:
    p = random_problem(24, 64)
    x = activations((3, 64))
    model = one_node_model(p, [3, 64], initializers=("codes", "row_scale", "col_scale"))
    y = session(model, native).run(None, {"X": x, "bias": p.bias})[0]
    np.testing.assert_array_equal(y, multiply(native, p, x, exact=False, isa=native.isa()))


@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize(("N", "K"), [(1024, 2048), (64, 17000), (1000, 4097)])
@pytest.mark.parametrize("exact", [0, 1])
def test_threads_change_nothing(native: KernelLibrary, M: int, N: int, K: int, exact: int) -> None:
    """Sizes above the grain of multiply.cpp, so that two threads do share the work."""
    model, x = one_node_model(random_problem(N, K), [M, K], exact=exact), activations((M, K))
    one, two = (session(model, native, threads=threads).run(None, {"X": x})[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_one_session_serves_many_threads(native: KernelLibrary) -> None:
    """Concurrent runs do not share a workspace."""
    p = random_problem(300, 700)
    s = session(one_node_model(p, ["M", 700]), native, threads=2)
    inputs = [activations((1 + i % 5, 700), seed=i) for i in range(24)]
    want = [s.run(None, {"X": x})[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: s.run(None, {"X": x})[0], inputs * 3))
    for y, expected in zip(got, want * 3, strict=True):
        np.testing.assert_array_equal(y, expected)


def test_calls_are_counted(native: KernelLibrary) -> None:
    s = session(one_node_model(random_problem(8, 16), ["M", 16]), native)
    before = native.calls()
    for _ in range(3):
        s.run(None, {"X": activations((2, 16))})
    assert native.calls() == before + 3


def test_the_sessions_mode_wins_over_the_nodes(native: KernelLibrary) -> None:
    p, x = random_problem(100, 300), activations((2, 300))
    lut, exact = (multiply(native, p, x, exact=e, isa=native.isa()) for e in (False, True))
    assert not np.array_equal(lut, exact)
    for mode, of_node, want in (("exact", 0, exact), ("lut", 1, lut), (None, 0, lut), (None, 1, exact)):
        s = session(one_node_model(p, [2, 300], exact=of_node), native, mode=mode)
        np.testing.assert_array_equal(s.run(None, {"X": x})[0], want)


def test_forced_instruction_set_runs(native: KernelLibrary) -> None:
    p, x = random_problem(100, 300), activations((2, 300))
    results = {}
    for isa in instruction_sets(native):
        results[isa] = session(one_node_model(p, [2, 300]), native.on(isa)).run(None, {"X": x})[0]
    assert len(plain_results(results)) == 2


def test_registering_twice_and_outliving_the_options(native: KernelLibrary) -> None:
    """Sessions of different options share the domain, and run after their options are gone."""
    p, x = random_problem(8, 16), activations((2, 16))
    sessions = [session(one_node_model(p, [2, 16]), native) for _ in range(3)]
    want = sessions[0].run(None, {"X": x})[0]
    del sessions[0]
    for s in sessions:
        np.testing.assert_array_equal(s.run(None, {"X": x})[0], want)


def test_a_column_count_that_does_not_fit(native: KernelLibrary) -> None:
    with pytest.raises(
        Exception, match=r"BinaryMatMul: codes has shape \(8, 2\), expected \(N, 3\) for attribute K = 24"
    ):
        session(one_node_model(random_problem(8, 16), [2, 16], K=24), native)
    with pytest.raises(Exception, match=r"BinaryMatMul: col_scale has shape \(16,\), expected \(15,\)"):
        session(one_node_model(random_problem(8, 16), [2, 16], K=15), native)
    with pytest.raises(Exception, match="BinaryMatMul: attribute K is 0, expected at least 1"):
        session(one_node_model(random_problem(8, 16), [2, 16], K=0), native)


def test_a_missing_column_count(native: KernelLibrary) -> None:
    model = one_node_model(random_problem(8, 16), [2, 16])
    del model.graph.node[0].attribute[:]
    with pytest.raises(Exception, match="BinaryMatMul: attribute K is missing"):
        session(model, native)


def test_an_unknown_mode(native: KernelLibrary) -> None:
    with pytest.raises(Exception, match="BinaryMatMul: attribute exact is 2, expected 0 or 1"):
        session(one_node_model(random_problem(8, 16), [2, 16], exact=2), native)


@pytest.mark.parametrize("name", ["codes", "row_scale", "col_scale"])
def test_weights_that_are_not_constant(native: KernelLibrary, name: str) -> None:
    constants = tuple({"codes", "row_scale", "col_scale", "bias"} - {name})
    with pytest.raises(Exception, match=f"BinaryMatMul: {name} is computed at run time .* expected a constant"):
        session(one_node_model(random_problem(8, 16), [2, 16], initializers=constants), native)


def test_scales_that_do_not_fit(native: KernelLibrary) -> None:
    p = random_problem(8, 16)
    p.r = p.r[:7]
    with pytest.raises(Exception, match=r"BinaryMatMul: row_scale has shape \(7,\), expected \(8,\)"):
        session(one_node_model(p, [2, 16]), native)
    p = random_problem(8, 16)
    p.c[3] = np.inf
    with pytest.raises(Exception, match=r"BinaryMatMul: col_scale\[3\] is not finite"):
        session(one_node_model(p, [2, 16]), native)


def test_inputs_that_do_not_fit_at_run_time(native: KernelLibrary) -> None:
    p = random_problem(8, 16)
    s = session(one_node_model(p, None), native)
    before = native.calls()
    with pytest.raises(Exception, match=r"BinaryMatMul: X has shape \(2, 15\), expected \(..., 16\)"):
        s.run(None, {"X": activations((2, 15))})
    with pytest.raises(Exception, match=r"BinaryMatMul: X has shape \(\), expected \(..., 16\)"):
        s.run(None, {"X": np.array(1.0, np.float32)})
    assert native.calls() == before
    p.bias = p.bias[:7]
    s = session(one_node_model(p, [2, 16]), native)
    with pytest.raises(Exception, match=r"BinaryMatMul: bias has shape \(7,\), expected \(8,\)"):
        s.run(None, {"X": activations((2, 16))})


def test_a_wrong_element_type_is_refused(native: KernelLibrary) -> None:
    p = random_problem(8, 16)
    p.r = p.r.astype(np.float32)
    with pytest.raises(Exception, match=r"'tensor\(float\)' of input parameter \(row_scale\)"):
        session(one_node_model(p, [2, 16]), native)


def test_every_optimization_level_runs_native(native: KernelLibrary) -> None:
    p, x = random_problem(8, 16), activations((2, 16))
    levels = ort.GraphOptimizationLevel
    for level in (
        levels.ORT_DISABLE_ALL,
        levels.ORT_ENABLE_BASIC,
        levels.ORT_ENABLE_EXTENDED,
        levels.ORT_ENABLE_ALL,
    ):
        before = native.calls()
        session(one_node_model(p, [2, 16]), native, level=level).run(None, {"X": x})
        assert native.calls() == before + 1
