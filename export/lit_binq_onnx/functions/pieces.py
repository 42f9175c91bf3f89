"""What the function bodies of all operators are made of.

Legend: X (..., K) activations, W (N, K) the dense weight. Names of values are local to a body, so every piece is used
at most once in a body, or is given a prefix for its own.

Bodies make W from constants only, so that the runtime folds it when it loads the model (at 32 times the memory of the
bits) and every call is one Gemm.
"""

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

node = helper.make_node


def constant(name: str, value: np.ndarray) -> NodeProto:
    """A constant of the body."""
    return node("Constant", [], [name], value=numpy_helper.from_array(value, name))


def attribute(name: str, attribute_name: str) -> NodeProto:
    """A scalar int64 constant that takes the value of the function's attribute."""
    made = node("Constant", [], [name])
    made.attribute.append(AttributeProto(name="value_int", ref_attr_name=attribute_name, type=AttributeProto.INT))
    return made


def shared() -> list[NodeProto]:
    """Constants that the other pieces read: axes, `columns` (1,) = K, `one` and `two`."""
    return [
        constant("bit_numbers", np.arange(8, dtype=np.uint8)),
        constant("one_bit", np.array(1, np.uint8)),
        constant("rows_by_all", np.array([0, -1], np.int64)),
        constant("axis_0", np.array([0], np.int64)),
        constant("axis_1", np.array([1], np.int64)),
        constant("axis_2", np.array([2], np.int64)),
        constant("one", np.array(1, np.float32)),
        constant("two", np.array(2, np.float32)),
        attribute("columns_scalar", "K"),
        node("Unsqueeze", ["columns_scalar", "axis_0"], ["columns"]),
    ]


def bits(source: str, result: str) -> list[NodeProto]:
    """Packed bits (R, ceil(K / 8)) uint8 to (R, K) uint8 of 0 and 1."""
    p = f"{result}_"
    return [
        node("Unsqueeze", [source, "axis_2"], [f"{p}bytes"]),
        node("BitShift", [f"{p}bytes", "bit_numbers"], [f"{p}shifted"], direction="RIGHT"),
        node("BitwiseAnd", [f"{p}shifted", "one_bit"], [f"{p}single"]),
        node("Reshape", [f"{p}single", "rows_by_all"], [f"{p}padded"]),
        node("Slice", [f"{p}padded", "axis_0", "columns", "axis_1"], [result]),
    ]


def signs(source: str, result: str) -> list[NodeProto]:
    """Packed bits (R, ceil(K / 8)) uint8 to (R, K) float32 of -1 and +1."""
    p = f"{result}_"
    return [
        *bits(source, f"{p}bits"),
        node("Cast", [f"{p}bits"], [f"{p}values"], to=TensorProto.FLOAT),
        node("Mul", [f"{p}values", "two"], [f"{p}doubled"]),
        node("Sub", [f"{p}doubled", "one"], [result]),
    ]


def column_of(source: str, result: str) -> list[NodeProto]:
    """float16 (N,) to float32 (N, 1)."""
    return [
        node("Cast", [source], [f"{result}_float"], to=TensorProto.FLOAT),
        node("Unsqueeze", [f"{result}_float", "axis_1"], [result]),
    ]


def bitmap(source: str, result: str) -> list[NodeProto]:
    """Packed bits (ceil(K / 8),) uint8, or (0,) for all clear, to (K,) int64 of 0 and 1."""
    p = f"{result}_"
    return [
        # an empty bitmap is filled up with clear bits to K, a full one is cut there
        constant(f"{p}shape", np.array([1, -1], np.int64)),
        constant(f"{p}no_byte", np.array([0], np.uint8)),
        constant(f"{p}seven", np.array([7], np.int64)),
        constant(f"{p}eight", np.array([8], np.int64)),
        node("Add", ["columns", f"{p}seven"], [f"{p}columns_up"]),
        node("Div", [f"{p}columns_up", f"{p}eight"], [f"{p}width"]),
        node("Expand", [f"{p}no_byte", f"{p}width"], [f"{p}clear"]),
        node("Concat", [source, f"{p}clear"], [f"{p}filled"], axis=0),
        node("Slice", [f"{p}filled", "axis_0", f"{p}width", "axis_0"], [f"{p}cut"]),
        node("Reshape", [f"{p}cut", f"{p}shape"], [f"{p}row"]),
        *bits(f"{p}row", f"{p}row_bits"),
        node("Squeeze", [f"{p}row_bits", "axis_0"], [f"{p}bits"]),
        node("Cast", [f"{p}bits"], [result], to=TensorProto.INT64),
    ]


def column_blocks() -> list[NodeProto]:
    """`blocks` (K,) int64: the number j // group of every column; reads the attribute `group`."""
    return [
        constant("zero_scalar", np.array(0, np.int64)),
        constant("one_scalar", np.array(1, np.int64)),
        attribute("group_scalar", "group"),
        node("Range", ["zero_scalar", "columns_scalar", "one_scalar"], ["column_numbers"]),
        node("Div", ["column_numbers", "group_scalar"], ["blocks"]),
    ]


def product(x: str = "X") -> list[NodeProto]:
    """Y = x W^T + bias, Gemm being used for its optional third input: a node without bias leaves it empty.

    Args:
        x: the value that is multiplied, of X's shape.
    """
    return [
        # (..., K) -> (M, K) -> (M, N) -> (..., N); allowzero keeps empty dimensions empty
        node("Flatten", [x], ["X_rows"], axis=-1),
        node("Gemm", ["X_rows", "W", "bias"], ["Y_rows"], transB=1),
        node("Shape", ["X"], ["leading"], start=0, end=-1),
        node("Shape", ["codes"], ["rows"], start=0, end=1),
        node("Concat", ["leading", "rows"], ["Y_shape"], axis=0),
        node("Reshape", ["Y_rows", "Y_shape"], ["Y"], allowzero=1),
    ]
