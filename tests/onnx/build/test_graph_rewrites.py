"""Small rewrites of an exported graph."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lit_binq_onnx.build.graph import divide_by_roots, drop_full_slices


def small_graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> ir.Model:
    """x (2, 3) -> y, with constants as initializers."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


@pytest.mark.parametrize(
    ("start", "end", "step", "dropped"),
    [(0, 2**63 - 1, 1, 1), (1, 2**63 - 1, 1, 0), (0, 2, 1, 0), (0, 2**63 - 1, 2, 0)],
)
def test_only_slices_of_everything_are_dropped(start: int, end: int, step: int, dropped: int) -> None:
    constants = {"s": np.array([start]), "e": np.array([end]), "a": np.array([1]), "t": np.array([step])}
    nodes = [
        helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["z"]),
        helper.make_node("Neg", ["z"], ["y"]),
    ]
    graph = small_graph(nodes, constants)
    assert drop_full_slices(graph.graph) == dropped
    assert [n.op_type for n in graph.graph] == ["Slice"] * (1 - dropped) + ["Neg"]


@pytest.mark.parametrize("order", [0, 1])
def test_products_with_a_reciprocal_root_become_quotients(order: int) -> None:
    nodes = [
        helper.make_node("Sqrt", ["x"], ["r"]),
        helper.make_node("Reciprocal", ["r"], ["i"]),
        helper.make_node("Mul", ["x", "i"] if order else ["i", "x"], ["z"]),
        helper.make_node("Neg", ["z"], ["y"]),
    ]
    graph = small_graph(nodes, {})
    assert divide_by_roots(graph.graph) == 1
    assert [n.op_type for n in graph.graph] == ["Sqrt", "Div", "Neg"]
    assert [v.name for v in graph.graph[1].inputs] == ["x", "r"]
