"""The function body: the same file without the native library, and the native operator winning over it."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lit_binq.formats import binary_matmul
from lit_binq_onnx.functions import add_functions, binary_matmul_function
from lit_binq_onnx.runtime.library import NativeLibrary
from native import INLINED, LEVELS, NOT_INLINED_AHEAD, Problem, one_node_model, random_problem, require_native, session

BODY = (binary_matmul_function(),)


@pytest.fixture(scope="module")
def native() -> NativeLibrary:
    return require_native()


def activations(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def two_layers() -> tuple[onnx.ModelProto, Problem, Problem]:
    """X (M, 24) -> with bias -> (M, 16) -> without bias -> Y (M, 8): one body serves both kinds of node."""
    first, second = random_problem(16, 24, seed=1), random_problem(8, 16, bias=False, seed=2)
    nodes, initializers = [], []
    for name, p, source, result in (("a", first, "X", "H"), ("b", second, "H", "Y")):
        tensors = {"codes": p.codes, "row_scale": p.r, "col_scale": p.c}
        if p.bias is not None:
            tensors["bias"] = p.bias
        initializers += [numpy_helper.from_array(value, f"{name}.{key}") for key, value in tensors.items()]
        inputs = [source, *(f"{name}.{key}" for key in tensors)]
        nodes.append(helper.make_node("BinaryMatMul", inputs, [result], name, domain="lit_binq", K=p.K))
    graph = helper.make_graph(
        nodes,
        "two_layers",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", 24])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", 8])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    add_functions(model)
    return model, first, second


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", [INLINED, NOT_INLINED_AHEAD])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37), (2, 0, 37)])
def test_stock_runtime_runs_the_body(
    shape: tuple[int, ...], config: dict[str, str], level: ort.GraphOptimizationLevel, bias: bool
) -> None:
    p, x = random_problem(19, 37, bias=bias), activations(shape)
    model = one_node_model(p, [*shape], functions=BODY)
    y = session(model, None, level=level, config=config).run(None, {"X": x})[0]
    assert y.shape == (*shape[:-1], 19)
    np.testing.assert_allclose(y.reshape(-1, 19), p.reference(x.reshape(-1, 37)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [INLINED, NOT_INLINED_AHEAD])
def test_nodes_with_and_without_bias_in_one_graph(config: dict[str, str]) -> None:
    model, first, second = two_layers()
    onnx.checker.check_model(model, full_check=True)
    x = activations((3, 24))
    y = session(model, None, config=config).run(None, {"X": x})[0]
    np.testing.assert_allclose(y, second.reference(first.reference(x).astype(np.float32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [0, 1])
def test_the_body_takes_the_native_attributes(exact: int) -> None:
    p, x = random_problem(19, 37), activations((5, 37))
    y = session(one_node_model(p, ["M", 37], exact=exact, functions=BODY), None).run(None, {"X": x})[0]
    np.testing.assert_allclose(y, p.reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_body_agrees_with_torch(bias: bool) -> None:
    """The custom operator that PyTorch models call is the same function."""
    p, x = random_problem(64, 100, bias=bias), activations((2, 3, 100))
    tensors = [torch.from_numpy(a) for a in (x, p.codes, p.r, p.c)]
    want = binary_matmul(*tensors, torch.from_numpy(p.bias) if p.bias is not None else None, 100)
    y = session(one_node_model(p, ["B", "T", 100], functions=BODY), None).run(None, {"X": x})[0]
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", [INLINED, NOT_INLINED_AHEAD])
def test_the_native_operator_wins_over_the_body(
    native: NativeLibrary, level: ort.GraphOptimizationLevel, config: dict[str, str]
) -> None:
    model, _, _ = two_layers()
    x = activations((3, 24))
    before = native.calls()
    y = session(model, native, level=level, config=config).run(None, {"X": x})[0]
    assert native.calls() == before + 2
    unmodified = session(model, None, level=level, config=config).run(None, {"X": x})[0]
    assert native.calls() == before + 2
    assert not np.array_equal(y, unmodified)  # byte tables: the kernel ran, not the body
    np.testing.assert_allclose(y, unmodified, atol=0.1 * np.abs(unmodified).max())


def test_exact_mode_agrees_with_the_body(native: NativeLibrary) -> None:
    model, _, _ = two_layers()
    x = activations((3, 24))
    y = session(model, native, mode="exact").run(None, {"X": x})[0]
    np.testing.assert_allclose(y, session(model, None).run(None, {"X": x})[0], rtol=1e-4, atol=1e-4)


def test_adding_bodies_twice_changes_nothing() -> None:
    model, _, _ = two_layers()
    once = model.SerializeToString(deterministic=True)
    add_functions(model)
    assert model.SerializeToString(deterministic=True) == once
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18), ("lit_binq", 1)]
