"""The accuracy of MatMulNBits changed in a file's bytes is what the onnx package makes of it."""

import itertools
from pathlib import Path

import onnx
import pytest
from conftest import byte_tokenizer
from onnx import helper

from exporting import fusable_model
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.graph_bytes import with_float_activations
from lit_binq_onnx.runtime.session import FUSED, MODEL


def changed(model: onnx.ModelProto) -> int:
    """Change a model with onnx; returns how many attributes that were."""
    count = 0
    for node in itertools.chain(model.graph.node, *(body.node for body in model.functions)):
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i, count = 1, count + 1
    return count


def test_exported_files(tmp_path: Path) -> None:
    export_onnx(fusable_model("llama"), byte_tokenizer(), tmp_path / "out", check=False, head_bits=4)
    for name in (MODEL, FUSED):
        data = (tmp_path / "out" / name).read_bytes()
        expected, found = onnx.ModelProto.FromString(data), onnx.ModelProto.FromString(with_float_activations(data))
        assert expected == onnx.ModelProto.FromString(data)
        assert changed(expected) > 0
        assert found == expected


def test_other_nodes_and_attributes_stay() -> None:
    nodes = [
        helper.make_node(kind, ["x"], ["y"], name="n" * 300, accuracy_level=4, bits=4, K=2**40, f=1.5, g=[1.0, 2.0])
        for kind in ("MatMulNBits", "GatherBlockQuantized")
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    found = onnx.ModelProto.FromString(with_float_activations(model.SerializeToString()))
    assert changed(model) == 1
    assert found == model


@pytest.mark.parametrize("data", [b"no protobuf at all", b"\x3a\xff", b"\x3b"])
def test_bytes_of_another_kind_end(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        with_float_activations(data)
