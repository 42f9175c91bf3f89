"""The native grouped operator against float64, and its function body without a library.

Legend: as in grouped_problems.py.
"""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from grouped_problems import Grouped, activations, grouped, model, one_node
from lit_binq.formats import grouped_binary_matmul
from native import KernelLibrary, instruction_sets, plain_results, require_kernels, session

# As for row x column.
EXACT_ERROR = 1.2e-5
FLOAT_ERROR = 4e-5
SUBNORMAL = 3e-45


def multiply(native: KernelLibrary, p: Grouped, x: np.ndarray, *, exact: bool, isa: str) -> np.ndarray:
    return session(one_node(p, exact=int(exact), rank=x.ndim), native.on(isa)).run(None, {"X": x})[0]


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


def both_modes_agree(native: KernelLibrary, p: Grouped, x: np.ndarray) -> None:
    """All instruction sets give the same bits, and those lie within what the modes promise."""
    want, magnitude = p.reference(x), p.magnitude(x)
    for exact in (True, False):
        results = {isa: multiply(native, p, x, exact=exact, isa=isa) for isa in instruction_sets(native)}
        for isa, y in plain_results(results).items():
            error = np.abs(y - want)
            if exact:
                bound = EXACT_ERROR * magnitude + SUBNORMAL
            else:
                bound = p.lut_bound(x, isa) + FLOAT_ERROR * magnitude + SUBNORMAL
            assert (error <= bound).all(), (exact, isa, (error / bound).max())


shapes = {"M": st.integers(1, 5), "N": st.integers(1, 140), "K": st.integers(1, 600), "bias": st.booleans()}
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=40)
@given(group=st.integers(1, 128).map(lambda i: 8 * i), seed=seeds, **shapes)
@example(M=1, N=1, K=1, bias=False, group=8, seed=0)
@example(M=5, N=1, K=37, bias=True, group=8, seed=1)
@example(M=2, N=129, K=520, bias=True, group=264, seed=2)  # a group that is no multiple of a block
@example(M=40, N=33, K=600, bias=True, group=1024, seed=3)  # more rows than a panel
def test_grouped_any_shape(native: KernelLibrary, M: int, N: int, K: int, bias: bool, group: int, seed: int) -> None:
    both_modes_agree(native, grouped(N, K, group, bias=bias, seed=seed), activations(M, K, seed))


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e30])
def test_extreme_activations(native: KernelLibrary, scale: float) -> None:
    """Nothing overflows or vanishes on the way where the result does not."""
    p = grouped(40, 600, 32, bias=False)
    x = activations(3, 600)
    x[1, 100] = 1e3  # one outlier
    x[2] *= 10.0 ** np.random.default_rng(1).uniform(-6, 6, 600)
    both_modes_agree(native, p, (x * np.float32(scale)).astype(np.float32))


def test_extreme_scales(native: KernelLibrary) -> None:
    """Scales at both ends of float16, beside each other in a row."""
    rng = np.random.default_rng(0)
    p = grouped(40, 300, 32, bias=False)
    p.scales[:] = rng.choice(np.array([65504, -65504, 6e-8, -6e-8, 0], np.float16), p.scales.shape)
    unmodified = session(one_node(p, body=True), None)
    for scale in (1e-30, 1.0, 1e25):
        x = activations(2, 300) * np.float32(scale)
        want = unmodified.run(None, {"X": x})[0]
        for exact in (True, False):
            results = {isa: multiply(native, p, x, exact=exact, isa=isa) for isa in instruction_sets(native)}
            # 300 products of 65504 |x| at most, in tables half a unit of 127 each
            bound = 65504.0 * np.abs(x).sum(1, keepdims=True) * (1e-5 if exact else 0.05)
            for y in plain_results(results).values():
                assert (np.abs(y - want) <= bound).all()


@pytest.mark.parametrize("exact", [False, True])
def test_bad_activations_show(native: KernelLibrary, exact: bool) -> None:
    """A row with a NaN is NaN throughout; the rows beside it are untouched."""
    p, x = grouped(40, 300, 32), activations(3, 300)
    clean = {isa: multiply(native, p, x, exact=exact, isa=isa) for isa in instruction_sets(native)}
    x[1, 299] = np.nan
    for isa in instruction_sets(native):
        y = multiply(native, p, x, exact=exact, isa=isa)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2]], clean[isa][[0, 2]])


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1024, 1500), (9, 700, 700)])
def test_threads_change_nothing(native: KernelLibrary, exact: int, M: int, N: int, K: int) -> None:
    model, x = one_node(grouped(N, K, 32), exact=exact), activations(M, K)
    one, two = (session(model, native, threads=threads).run(None, {"X": x})[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_modes_and_calls(native: KernelLibrary) -> None:
    """The session's mode reaches the operator, and it counts."""
    p, x = grouped(40, 300, 32), activations(2, 300)
    lut, exact = (multiply(native, p, x, exact=e, isa=native.isa()) for e in (False, True))
    assert not np.array_equal(lut, exact)
    forced = session(one_node(p, exact=0), native, mode="exact")
    before = native.calls()
    np.testing.assert_array_equal(forced.run(None, {"X": x})[0], exact)
    assert native.calls() == before + 1


@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (2, 0, 37)])
def test_any_rank(native: KernelLibrary, shape: tuple[int, ...]) -> None:
    p = grouped(19, 37, 32)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y = multiply(native, p, x, exact=True, isa=native.isa())
    assert y.shape == (*shape[:-1], 19)
    np.testing.assert_allclose(y.reshape(-1, 19), p.reference(x.reshape(-1, 37)), rtol=1e-4, atol=1e-4)
    s = session(one_node(p, rank=3), native)
    assert s.get_outputs()[0].shape == ["d0", "d1", 19]


# --- the function body, without the library


@pytest.mark.parametrize("level", [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37), (2, 0, 37)])
def test_stock_runtime_runs_the_body(
    shape: tuple[int, ...], bias: bool, level: ort.GraphOptimizationLevel | None
) -> None:
    p = grouped(19, 37, 32, bias=bias)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y = session(one_node(p, body=True, rank=x.ndim), None, level=level).run(None, {"X": x})[0]
    assert y.shape == (*shape[:-1], 19)
    np.testing.assert_allclose(y.reshape(-1, 19), p.reference(x.reshape(-1, 37)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"session.disable_aot_function_inlining": "1"}])
@pytest.mark.parametrize(
    "p",
    [
        grouped(5, 64, 8),
        grouped(1, 9, 1024, bias=False),
    ],
    ids=lambda p: str(p.W.shape),
)
def test_bodies_at_the_edges(p: Grouped, config: dict[str, str]) -> None:
    model = one_node(p, body=True)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["d0", len(p.W)]))
    onnx.checker.check_model(model, full_check=True)
    x = activations(3, p.W.shape[1])
    y = session(one_node(p, body=True, exact=1), None, config=config).run(None, {"X": x})[0]
    np.testing.assert_allclose(y, p.reference(x), rtol=1e-5, atol=1e-4 * max(1.0, np.abs(p.W).max()))


@pytest.mark.parametrize("bias", [False, True])
def test_bodies_agree_with_torch(bias: bool) -> None:
    """The custom operator that PyTorch models call is the same function."""
    p, x = grouped(64, 100, 32, bias=bias), activations(5, 100)
    tensors = [None if a is None else torch.from_numpy(a) for a in (x, p.codes, p.scales, p.bias)]
    want = grouped_binary_matmul(*tensors, p.K, p.group)
    y = session(one_node(p, body=True), None).run(None, {"X": x})[0]
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-5, atol=1e-4)


# --- what does not fit


def refused(native: KernelLibrary, made: onnx.ModelProto, message: str) -> None:
    with pytest.raises(Exception, match=rf"lit_binq\.GroupedBinaryMatMul: {message}"):
        session(made, native)


def test_grouped_tensors_that_do_not_fit(native: KernelLibrary) -> None:
    p = grouped(8, 64, 16)
    p.group = 32
    refused(native, one_node(p), r"scales has shape \(8, 4\), expected \(8, 2\) for 64 columns in groups of 32")
    p.group = 0
    refused(native, one_node(p), "attribute group is 0, expected at least 1")
    made = model("GroupedBinaryMatMul", {"codes": p.codes, "scales": p.scales}, {"K": 64})
    refused(native, made, "attribute group is missing, expected the columns that share a scale")
    p = grouped(8, 64, 16)
    p.scales[1, 2] = np.inf
    refused(native, one_node(p), r"scales\[6\] is not finite")
