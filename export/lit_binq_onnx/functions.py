"""Function bodies: the operators of domain lit_binq written in standard ONNX operators.

A model that carries them runs on any ONNX Runtime: without the native library the runtime inlines the body,
with the library registered it runs the native operator. Knows ONNX only.

Legend: X (..., K) activations, B (N, K) signs packed as in `lit_binq.formats.packing`, r (N,) row scales,
c (K,) column scales.
"""

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

DOMAIN = "lit_binq"
VERSION = 1
OPSET = 18
"""BitwiseAnd on integers is standard from opset 18 on."""


def _constant(name: str, value: np.ndarray) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


def _attribute(name: str, attribute: str) -> NodeProto:
    """A scalar int64 constant that takes the value of the function's attribute."""
    node = helper.make_node("Constant", [], [name])
    node.attribute.append(AttributeProto(name="value_int", ref_attr_name=attribute, type=AttributeProto.INT))
    return node


def binary_matmul_function() -> FunctionProto:
    """The body of lit_binq.BinaryMatMul: Y = ((X * c) B^T) * r + bias.

    Inputs:
        X: float32 (..., K), at least one dimension.
        codes: uint8 (N, ceil(K / 8)).
        row_scale: float16 (N,).
        col_scale: float16 (K,).
        bias: float32 (N,), optional: the node may leave it out.

    Attributes:
        K: int, in_features.
        exact: int, default 0. The native operator's mode; the body computes in float32 either way.

    Output:
        Y: float32 (..., N).

    The dense weight W = r B c is made from constants only, so that the runtime folds it when it loads the
    model (at 32 times the memory of the bits) and every call is one Gemm. A product of two float16 scales has
    22 bits of mantissa: W is exact in float32. Gemm is used for its optional third input: a node without bias
    leaves it empty.
    """
    node = helper.make_node
    body = [
        # signs: (N, ceil(K/8)) -> (N, ceil(K/8), 8) bits -> (N, K) of -1 and +1
        _constant("bit_numbers", np.arange(8, dtype=np.uint8)),
        _constant("one_bit", np.array(1, np.uint8)),
        _constant("rows_by_all", np.array([0, -1], np.int64)),
        _constant("axis_0", np.array([0], np.int64)),
        _constant("axis_1", np.array([1], np.int64)),
        _constant("axis_2", np.array([2], np.int64)),
        _constant("one", np.array(1, np.float32)),
        _constant("two", np.array(2, np.float32)),
        _attribute("columns_scalar", "K"),
        node("Unsqueeze", ["columns_scalar", "axis_0"], ["columns"]),
        node("Unsqueeze", ["codes", "axis_2"], ["code_bytes"]),
        node("BitShift", ["code_bytes", "bit_numbers"], ["shifted"], direction="RIGHT"),
        node("BitwiseAnd", ["shifted", "one_bit"], ["bits"]),
        node("Reshape", ["bits", "rows_by_all"], ["padded_bits"]),
        node("Slice", ["padded_bits", "axis_0", "columns", "axis_1"], ["sign_bits"]),
        node("Cast", ["sign_bits"], ["sign_values"], to=TensorProto.FLOAT),
        node("Mul", ["sign_values", "two"], ["doubled"]),
        node("Sub", ["doubled", "one"], ["signs"]),
        # W = r B c
        node("Cast", ["row_scale"], ["r"], to=TensorProto.FLOAT),
        node("Cast", ["col_scale"], ["c"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["r", "axis_1"], ["r_column"]),
        node("Mul", ["signs", "r_column"], ["scaled_rows"]),
        node("Mul", ["scaled_rows", "c"], ["W"]),
        # (..., K) -> (M, K) -> (M, N) -> (..., N); allowzero keeps empty dimensions empty
        node("Flatten", ["X"], ["X_rows"], axis=-1),
        node("Gemm", ["X_rows", "W", "bias"], ["Y_rows"], transB=1),
        node("Shape", ["X"], ["leading"], start=0, end=-1),
        node("Shape", ["r"], ["rows"]),
        node("Concat", ["leading", "rows"], ["Y_shape"], axis=0),
        node("Reshape", ["Y_rows", "Y_shape"], ["Y"], allowzero=1),
    ]
    return helper.make_function(
        DOMAIN,
        "BinaryMatMul",
        ["X", "codes", "row_scale", "col_scale", "bias"],
        ["Y"],
        body,
        [helper.make_opsetid("", OPSET)],
        attributes=["K"],
        attribute_protos=[helper.make_attribute("exact", 0)],
    )


def add_functions(model: onnx.ModelProto) -> None:
    """Add the bodies of this domain to a model, in place, and declare the domain where it is missing.

    Bodies of the same name are replaced.
    """
    function = binary_matmul_function()
    kept = [f for f in model.functions if (f.domain, f.name) != (function.domain, function.name)]
    del model.functions[:]
    model.functions.extend([*kept, function])
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
