"""NormBinaryMatMulQKV and NormBinaryGatedMLP in the runtime: bodies, shapes, and what is refused."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from fused_problems import activations, attention, feeds, gamma, mlp, model, run
from lit_binq_onnx.functions import add_functions
from native import INLINED, LEVELS, NOT_INLINED_AHEAD, KernelLibrary, random_problem, require_kernels, session


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


# --- in the runtime


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", [INLINED, NOT_INLINED_AHEAD])
def test_body_and_native_operator_in_one_file(
    native: KernelLibrary, level: ort.GraphOptimizationLevel, config: dict[str, str]
) -> None:
    """Bodies call BinaryMatMul, whose body the model carries too; the native operator wins over all of them."""
    for made in (
        model("NormBinaryMatMulQKV", attention((16, 8, 8), 37), ["b", "s", 37], body=True),
        model("NormBinaryGatedMLP", mlp(37, 48, 24), ["b", "s", 37], body=True),
    ):
        onnx.checker.check_model(made, full_check=True)
        x, before = activations(2, 5, 37), native.calls()
        unmodified = session(made, None, level=level, config=config).run(None, feeds(x))[0]
        assert native.calls() == before
        exact = session(made, native, level=level, config=config, mode="exact").run(None, feeds(x))[0]
        assert native.calls() == before + 3
        lut = session(made, native, level=level, config=config).run(None, feeds(x))[0]
        assert (
            exact.shape == unmodified.shape == (2, 5, 24 if made.graph.node[0].op_type == "NormBinaryGatedMLP" else 32)
        )
        np.testing.assert_allclose(exact, unmodified, atol=1e-5 * np.abs(unmodified).max())
        assert 1e-4 < np.abs(lut - unmodified).max() / np.abs(unmodified).max() < 0.1


@pytest.mark.parametrize("kind", ["NormBinaryMatMulQKV", "NormBinaryGatedMLP"])
def test_natively_one_node_runs(native: KernelLibrary, kind: str, tmp_path: Path) -> None:
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


def test_dynamic_dimensions_keep_their_names(native: KernelLibrary) -> None:
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


def test_tensors_that_do_not_fit(native: KernelLibrary) -> None:
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


def test_attributes_that_do_not_fit(native: KernelLibrary) -> None:
    with pytest.raises(Exception, match="NormBinaryMatMulQKV: attribute exact is 2, expected 0 or 1"):
        session(model("NormBinaryMatMulQKV", attention((16, 8, 8), 37), None, exact=2), native)
    for name, meaning in (("H", "the rows of gate and up"), ("epsilon", "what the norm adds to the mean of squares")):
        made = model("NormBinaryGatedMLP", mlp(37, 48, 24), None)
        made.graph.node[0].attribute.remove(next(a for a in made.graph.node[0].attribute if a.name == name))
        with pytest.raises(Exception, match=f"NormBinaryGatedMLP: attribute {name} is missing, expected {meaning}"):
            session(made, native)
    for bad in (-1e-5, np.nan, np.inf):
        with pytest.raises(Exception, match=r"attribute epsilon is .*, expected a finite number"):
            session(model("NormBinaryGatedMLP", mlp(37, 48, 24), None, epsilon=float(bad)), native)


@pytest.mark.parametrize("name", ["gamma", "codes_v", "row_scale_k", "col_scale_q"])
def test_weights_that_are_not_constant(native: KernelLibrary, name: str) -> None:
    with pytest.raises(Exception, match=f"QKV: {name} is computed at run time .* expected a constant"):
        session(model("NormBinaryMatMulQKV", attention((16, 8, 8), 37), None, inputs=(name,)), native)


def test_inputs_that_do_not_fit_at_run_time(native: KernelLibrary) -> None:
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
