"""The operators of domain lit_binq written in standard ONNX operators, one function each.

Every operator is a linear layer with packed weights. Its inputs are X float32 (..., K), the tensors of the weight,
and a bias float32 (N,) that a node may leave out; its output is Y float32 (..., N). Its attributes are K (int,
in_features), what the format adds, and `exact` (int, default 0): the native operator's mode, while a body computes in
float32 either way.

Legend: B (N, K) signs packed as in `lit_binq.formats.packing`, W (N, K) the dense weight.
"""

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper

from lit_binq_onnx.functions.pieces import (
    bits,
    column_blocks,
    column_of,
    constant,
    node,
    product,
    shared,
    signs,
)

DOMAIN = "lit_binq"
MICROSOFT = "com.microsoft"
"""Domain of the runtime's own operators beyond ONNX."""

VERSION = 1
OPSET = 18
"""BitwiseAnd on integers is standard from opset 18 on."""


def linear_function(
    name: str, tensors: list[str], body: list[NodeProto], attributes: tuple[str, ...] = ("K",), x: str = "X"
) -> FunctionProto:
    """An operator of the domain.

    Args:
        name: of the operator.
        tensors: names of the weight's inputs, in order.
        body: nodes that make W, and x if that is not X itself.
        attributes: whole numbers that a node must have.
        x: the value that W is multiplied by.
    """
    return helper.make_function(
        DOMAIN,
        name,
        ["X", *tensors, "bias"],
        ["Y"],
        [*shared(), *body, *product(x)],
        [helper.make_opsetid("", OPSET)],
        attributes=list(attributes),
        attribute_protos=[helper.make_attribute("exact", 0)],
    )


def binary_matmul_function() -> FunctionProto:
    """lit_binq.BinaryMatMul: W = diag(r) B diag(c).

    Tensors: codes uint8 (N, ceil(K / 8)), row_scale float16 (N,), col_scale float16 (K,).

    Computed as (X diag(c)) (diag(r) B)^T: what the runtime folds when it loads a model stays in memory until all is
    folded, so there is one float matrix in it rather than five.
    """
    body = [
        *bits("codes", "B_bits"),
        node("Cast", ["B_bits"], ["B_positive"], to=TensorProto.BOOL),
        *column_of("row_scale", "r"),
        node("Neg", ["r"], ["r_negative"]),
        node("Where", ["B_positive", "r", "r_negative"], ["W"]),
        node("Cast", ["col_scale"], ["c"], to=TensorProto.FLOAT),
        # Rows of K whatever the runtime believes of X: 1.18 infers that the output of attention is as wide as a query
        # that holds keys and values too.
        constant("any_rows", np.array([-1], np.int64)),
        node("Concat", ["any_rows", "columns"], ["rows_shape"], axis=0),
        node("Reshape", ["X", "rows_shape"], ["X_cut"]),
        node("Mul", ["X_cut", "c"], ["X_scaled"]),
    ]
    return linear_function("BinaryMatMul", ["codes", "row_scale", "col_scale"], body, x="X_scaled")


def grouped_binary_matmul_function() -> FunctionProto:
    """lit_binq.GroupedBinaryMatMul: W_nj = s[n, j // group] B_nj.

    Tensors: codes uint8 (N, ceil(K / 8)), scales float16 (N, ceil(K / group)). Attribute: group.
    """
    body = [
        *signs("codes", "B"),
        *column_blocks(),
        node("Cast", ["scales"], ["s"], to=TensorProto.FLOAT),
        node("Gather", ["s", "blocks"], ["s_columns"], axis=1),
        node("Mul", ["B", "s_columns"], ["W"]),
    ]
    return linear_function("GroupedBinaryMatMul", ["codes", "scales"], body, ("K", "group"))
