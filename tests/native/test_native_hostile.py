"""Models that mean harm: attributes and shapes at the ends of 64 bits, data at odd places. Sessions refuse or compute.

A library without bounds ends the process on some of these (group of grouped weights), or computes nonsense.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import grouped_problems as grouped
import two_plane_problems as two_plane
from attention_problems import Problem as Attention
from fused_problems import attention, mlp, model
from lit_binq_onnx.runtime.library import register
from native import KernelLibrary, one_node_model, random_problem, require_kernels, session
from nbits_problems import one_node_model as nbits_model
from nbits_problems import problem as nbits_problem

INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)
LIMIT = 2**31 - 1
"""The largest integer attribute that is taken (export/csrc/ops/reader.h)."""

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "BinaryMatMul": lambda: one_node_model(random_problem(3, 20), [2, 20]),
    "GroupedBinaryMatMul": lambda: grouped.one_node(grouped.grouped(3, 20, 64)),
    "TwoPlaneMatMul": lambda: two_plane.model(two_plane.problem(3, 20), ["M", 20]),
    "NBitsMatMul": lambda: nbits_model(nbits_problem(3, 20), [2, 20]),
    "NormBinaryMatMulQKV": lambda: model("NormBinaryMatMulQKV", attention((8, 4, 4), 20), ["M", 20]),
    "NormBinaryGatedMLP": lambda: model("NormBinaryGatedMLP", mlp(20, 24, 20), ["M", 20]),
    "CachedAttention": lambda: Attention(2, 1, 16, [3], 1, 4, 3).model(),
}


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


def with_attribute(made: onnx.ModelProto, name: str, value: int) -> onnx.ModelProto:
    node = made.graph.node[0]
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
    return made


@pytest.mark.parametrize("kind", MODELS)
def test_every_attribute_has_bounds(native: KernelLibrary, kind: str) -> None:
    """Each integer attribute in turn, at the ends of what 64 and 32 bits hold; K is wide enough to wrap by rounding."""
    names = [a.name for a in MODELS[kind]().graph.node[0].attribute if a.type == onnx.AttributeProto.INT]
    assert names
    for name in {*names, "exact"}:
        for value in (INT64_MAX, INT64_MAX - 6, INT64_MIN, LIMIT + 1, 2**32, -2):
            made = with_attribute(MODELS[kind](), name, value)
            if name == "local_window_size" and value > 0:  # means every token, as its documentation says
                session(made, native)
                continue
            with pytest.raises(Exception, match=rf"lit_binq\.{kind}: attribute {name} is {value}, expected "):
                session(made, native)


@pytest.mark.parametrize("kind", ["GroupedBinaryMatMul", "TwoPlaneMatMul"])
def test_a_group_of_64_bits_ends_no_process(native: KernelLibrary, kind: str) -> None:
    """Rounded up to whole groups in 64 bits it gave no group at all, and weights were read through null."""
    made = with_attribute(MODELS[kind](), "group", INT64_MAX)
    with pytest.raises(Exception, match=f"attribute group is {INT64_MAX}, expected at most {LIMIT}"):
        session(made, native).run(None, {"X": grouped.activations(2, 20)})


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("group", [20, 64, LIMIT])
def test_a_group_wider_than_the_layer_is_the_layer(native: KernelLibrary, group: int, exact: int) -> None:
    """The largest group that is taken gives what one group of all columns does, bit for bit."""
    x = grouped.activations(3, 20)
    p = grouped.grouped(3, 20, 20)
    made = grouped.one_node(p, exact=exact)
    want = session(made, native).run(None, {"X": x})[0]
    np.testing.assert_allclose(want, p.reference(x), atol=(1e-5 if exact else 0.1) * np.abs(p.reference(x)).max())
    got = session(with_attribute(made, "group", group), native).run(None, {"X": x})[0]
    np.testing.assert_array_equal(got, want)
    for bits in (0, 4, 8):
        q = two_plane.problem(3, 20, group=20, bits=bits)
        made = with_attribute(two_plane.model(q, ["M", 20]), "exact", exact)
        want = session(made, native).run(None, {"X": x})[0]
        got = session(with_attribute(made, "group", group), native).run(None, {"X": x})[0]
        np.testing.assert_array_equal(got, want)


def test_the_matrix_itself_takes_any_group(native: KernelLibrary) -> None:
    """Below the operator's reader: two_plane/matrix.h through the tests' C function. kernel_test has the others."""
    x = grouped.activations(2, 20)
    for isa in native.isas():
        p = two_plane.problem(3, 20, group=20, L=4)
        want = two_plane.multiply(native, p, x, isa)
        p.group = INT64_MAX
        np.testing.assert_array_equal(two_plane.multiply(native, p, x, isa), want)


def test_no_rows_and_very_many_columns(native: KernelLibrary) -> None:
    """A file of some bytes: nothing in it bounds K, and nothing may be made of K. In 4 GB, by the system's limit."""
    if sys.platform != "linux":
        pytest.skip("limits a process's memory as Linux does")
    done = subprocess.run(
        [sys.executable, __file__, str(native.path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")},
    )
    assert (done.returncode, done.stdout) == (0, "GroupedBinaryMatMul TwoPlaneMatMul "), done.stderr[-800:]


def empty_models(K: int) -> dict[str, onnx.ModelProto]:
    """Layers without rows, of K columns in groups of one."""
    u8, f16, f32 = np.uint8, np.float16, np.float32
    width = -(-K // 8)
    empty = np.zeros((0, width), u8)
    two = {"codes": empty, "selector": empty, "levels": np.zeros((0, K, 4), f16), "outlier_bits": np.zeros(0, u8)}
    two |= {"input_scales": np.zeros(0, f16), "input_range": np.zeros(0, f32)}
    shared = {"K": K, "group": 1}
    return {
        "GroupedBinaryMatMul": grouped.model(
            "GroupedBinaryMatMul", {"codes": empty, "scales": np.zeros((0, K), f16)}, shared
        ),
        "TwoPlaneMatMul": grouped.model("TwoPlaneMatMul", two, shared | {"activation_bits": 0, "outliers": 0}),
    }


def main(library: str) -> None:
    """Open and run them: X without rows either."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for kind, made in empty_models(LIMIT).items():
        made.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["M", LIMIT]))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(library)
        s = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert s.run(None, {"X": np.zeros((0, LIMIT), np.float32)})[0].shape == (0, 0)
        print(kind, end=" ")


def test_one_matrix_without_rows_among_others(native: KernelLibrary) -> None:
    """Values of no width beside queries and keys."""
    x = grouped.activations(5, 20)
    problems = attention((8, 4, 4), 20)
    none = random_problem(0, 20, bias=problems[2].bias is not None)
    made = model("NormBinaryMatMulQKV", [*problems[:2], none], ["M", 20], one_skip=True)
    whole = model("NormBinaryMatMulQKV", problems, ["M", 20], one_skip=True)
    given = {"hidden": x, "skip": np.zeros(20, np.float32)}
    got, want = (session(m, native).run(None, given)[0] for m in (made, whole))
    np.testing.assert_array_equal(got, want[:, :12])


@pytest.mark.parametrize("kind", ["NormBinaryMatMulQKV", "NormBinaryGatedMLP"])
def test_sums_are_written_where_nothing_is_multiplied(native: KernelLibrary, kind: str) -> None:
    """Matrices without rows: there is no product, but the sum in front of the norm is an output too."""
    x = grouped.activations(5, 20)
    problems = attention((0, 0, 0), 20) if kind == "NormBinaryMatMulQKV" else mlp(20, 24, 0)
    s = session(model(kind, problems, ["M", 20]), native)
    for i in range(3):  # the runtime's memory holds something else before
        hidden = x + np.float32(i)
        product, total = s.run(None, {"hidden": hidden, "skip": x})
        assert product.shape == (5, 0)
        np.testing.assert_array_equal(total, hidden + x)


def test_a_cache_of_no_rows_grows(native: KernelLibrary) -> None:
    """Without memory past and present have one address, or none; they do not share it."""
    p = Attention(2, 1, 16, [], 3, 4, 7)
    heads, key, value = session(p.model(), native).run(None, p.inputs)
    assert (heads.shape, key.shape, value.shape) == ((0, 3, 32), (0, 1, 7, 16), (0, 1, 7, 16))


def test_data_at_odd_places(native: KernelLibrary, tmp_path: Path) -> None:
    """An external data file may start a tensor anywhere: numbers of 2 and 4 bytes at odd offsets."""
    x = grouped.activations(3, 37)
    for kind in ("row column", "grouped", "nbits"):
        made = {
            "row column": lambda: one_node_model(random_problem(5, 37), [3, 37]),
            "grouped": lambda: grouped.one_node(grouped.grouped(5, 37, 8)),
            "nbits": lambda: nbits_model(nbits_problem(5, 37), [3, 37]),
        }[kind]()
        want = session(made, native).run(None, {"X": x})[0]
        content = bytearray(b"?")
        for tensor in made.graph.initializer:
            raw = tensor.raw_data
            if not raw:
                continue
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "odd.data"), ("offset", len(content)), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
            content += raw + b"?" * (len(raw) % 2)
        (tmp_path / "odd.data").write_bytes(content)
        (tmp_path / "odd.onnx").write_bytes(made.SerializeToString())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        register(options)
        s = ort.InferenceSession(tmp_path / "odd.onnx", options, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(s.run(None, {"X": x})[0], want)


def test_heads_of_no_tokens(native: KernelLibrary) -> None:
    """An empty tensor's other dimensions are bounded by nothing: heads times their width leaves 64 bits."""
    p = Attention(2, 1, 16, [3], 1, 4, 3, packed=False)
    made = p.model(num_heads=LIMIT, kv_num_heads=1)
    d = 2**46
    p.inputs = {name: np.zeros((0, *value.shape[1:]), value.dtype) for name, value in p.inputs.items()}
    p.inputs["past_key"] = p.inputs["past_value"] = np.zeros((0, 1, 4, d), np.float32)
    p.inputs["total_tokens"] = np.array(1, np.int32)
    with pytest.raises(Exception, match=rf"columns of all heads are {LIMIT} times {d}, expected at most"):
        session(made, native).run(None, p.inputs)


if __name__ == "__main__":
    main(sys.argv[1])
