"""The operator lit_binq.TwoPlaneMatMul in standard ONNX operators: four levels a weight, a rounded input if wanted.

Legend: K columns, P of them outliers; stored order: outliers first, ascending, then the others, ascending. A, S (N, K)
bits of weights in stored order, L numbers a row and group; of one row of X and one part of its columns (4 or 8 bits) lo
its lowest value and R its range; u = (X - lo) / R; lambda the 16 levels of the 4-bit part.

Columns of X stay where they are: the weight's are put back into their order, which the runtime does once, when it
loads the model. What follows from constants is outside of the If, so that only the rounding of X is left in it.
"""

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper

from lit_binq_onnx.functions.bodies import linear_function
from lit_binq_onnx.functions.pieces import attribute, bitmap, bits, column_blocks, constant, node

_FROM_4 = np.eye(4)
_FROM_3 = np.array([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, 1, 1], [0, 0, 0, 0]])
_FROM_2 = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
_FOUR_LEVELS = np.stack([0 * _FROM_4, 0 * _FROM_4, _FROM_2, _FROM_3, _FROM_4]).astype(np.float32)
"""(5, 4, 4): for L numbers, the first L rows of entry L make four levels of them, by code A + 2 S."""


def two_plane_matmul_function() -> FunctionProto:
    """lit_binq.TwoPlaneMatMul: W_nj = level[n, j // group, A_nj + 2 S_nj] in stored order, Y = x^ W^T + bias.

    Tensors: codes uint8 (N, ceil(K / 8)), the bits A; selector likewise, the bits S; levels float16
    (N, ceil(K / group), L), L = 4 four levels, L = 3 (m, a1, a2) for m +- a1 +- a2, L = 2 the same with m = 0;
    outlier_bits uint8 (ceil(K / 8),), or (0,) without outliers; input_scales float16 (5,), zeta and rho_0..rho_3, or
    (0,); input_range float32 (4,), lo and R of the 4-bit part and of the 8-bit part, or (0,) for each row's own.
    Attributes: group, activation_bits (0: x^ = X; 8; 4, with outliers at 8), outliers.
    """
    rounded = helper.make_graph(
        _rounded(), "rounded", [], [helper.make_tensor_value_info("x_rounded", TensorProto.FLOAT, None)]
    )
    given = helper.make_graph(
        [node("Identity", ["X"], ["x_given"])],
        "given",
        [],
        [helper.make_tensor_value_info("x_given", TensorProto.FLOAT, None)],
    )
    body = [
        *_columns(),
        *_weight(),
        *_scales(),
        node("Greater", ["bits_scalar", "zero_scalar"], ["is_rounded"]),
        node("If", ["is_rounded"], ["x"], then_branch=rounded, else_branch=given),
    ]
    tensors = ["codes", "selector", "levels", "outlier_bits", "input_scales", "input_range"]
    return linear_function("TwoPlaneMatMul", tensors, body, ("K", "group", "activation_bits", "outliers"), "x")


def _columns() -> list[NodeProto]:
    """`is_eight` (K,) bool, the columns with 8 bits, and `place` (K,), where each column is in stored order."""
    return [
        *column_blocks(),
        *bitmap("outlier_bits", "marked"),
        attribute("bits_scalar", "activation_bits"),
        constant("eight_scalar", np.array(8, np.int64)),
        node("Sub", ["one_scalar", "marked"], ["unmarked"]),
        node("NonZero", ["marked"], ["marked_columns"]),
        node("NonZero", ["unmarked"], ["unmarked_columns"]),
        node("Concat", ["marked_columns", "unmarked_columns"], ["order_row"], axis=1),
        node("Squeeze", ["order_row", "axis_0"], ["order"]),
        node("ScatterElements", ["column_numbers", "order", "column_numbers"], ["place"], axis=0),
        node("Cast", ["marked"], ["is_marked"], to=TensorProto.BOOL),
        node("Equal", ["bits_scalar", "eight_scalar"], ["all_eight"]),
        node("Or", ["is_marked", "all_eight"], ["is_eight"]),
    ]


def _weight() -> list[NodeProto]:
    """`W` (N, K) float32, columns as in X."""
    return [
        *bits("codes", "A"),
        *bits("selector", "S"),
        constant("four_levels", _FOUR_LEVELS),
        constant("four", np.array(4, np.int64)),
        node("Shape", ["levels"], ["numbers"], start=2, end=3),
        node("Gather", ["four_levels", "numbers"], ["mix_padded"], axis=0),
        node("Slice", ["mix_padded", "axis_0", "numbers", "axis_1"], ["mix_one"]),
        node("Squeeze", ["mix_one", "axis_0"], ["mix"]),
        node("Cast", ["levels"], ["levels_float"], to=TensorProto.FLOAT),
        node("MatMul", ["levels_float", "mix"], ["table"]),
        node("Flatten", ["table"], ["table_rows"], axis=1),
        node("Mul", ["blocks", "four"], ["first_long"]),
        node("Cast", ["first_long"], ["first_entry"], to=TensorProto.INT32),
        node("Add", ["S", "S"], ["S_twice"]),
        node("Add", ["A", "S_twice"], ["code"]),
        node("Cast", ["code"], ["code_int"], to=TensorProto.INT32),
        node("Add", ["code_int", "first_entry"], ["entry"]),
        node("GatherElements", ["table_rows", "entry"], ["W_stored"], axis=1),
        node("Gather", ["W_stored", "place"], ["W"], axis=1),
    ]


def _scales() -> list[NodeProto]:
    """`sorted_levels` (16,) and `midpoints` (15,) of the 4-bit part; `is_static` and the fixed lo and R, (1,) each.

    Scales and ranges that are not there count as zero; nothing reads them then.
    """
    made = [
        constant("zeros", np.zeros(5, np.float32)),
        constant("five", np.array([5], np.int64)),
        constant("four_vector", np.array([4], np.int64)),
        constant("fifteen", np.array([15], np.int64)),
        constant("sixteen", np.array([16], np.int64)),
        constant("half", np.array(0.5, np.float32)),
        node("Cast", ["input_scales"], ["scales_float"], to=TensorProto.FLOAT),
        node("Concat", ["scales_float", "zeros"], ["scales_filled"], axis=0),
        node("Slice", ["scales_filled", "axis_0", "five", "axis_0"], ["scales"]),
        constant("one_each", np.ones(5, np.int64)),
        node("Split", ["scales", "one_each"], ["lambda_zeta", *(f"rho_{k}" for k in range(4))], axis=0),
    ]
    level = "lambda_zeta"
    for k in range(4):  # one after the other: float32 sums depend on their order
        pattern = (np.arange(16) >> k & 1).astype(np.float32)
        made += [
            constant(f"bits_{k}", pattern),
            node("Mul", [f"rho_{k}", f"bits_{k}"], [f"lambda_part_{k}"]),
            node("Add", [level, f"lambda_part_{k}"], [f"lambda_{k}"]),
        ]
        level = f"lambda_{k}"
    return [
        *made,
        node("TopK", [level, "sixteen"], ["sorted_levels", "sorted_patterns"], axis=0, largest=0, sorted=1),
        node("Slice", ["sorted_levels", "axis_0", "fifteen", "axis_0"], ["lower"]),
        node("Slice", ["sorted_levels", "axis_1", "sixteen", "axis_0"], ["upper"]),
        node("Add", ["upper", "lower"], ["lower_and_upper"]),
        node("Mul", ["lower_and_upper", "half"], ["midpoints"]),
        node("Shape", ["input_range"], ["range_length"]),
        node("Greater", ["range_length", "axis_0"], ["is_static"]),
        node("Concat", ["input_range", "zeros"], ["range_filled"], axis=0),
        node("Slice", ["range_filled", "axis_0", "four_vector", "axis_0"], ["range_four"]),
        constant("one_of_four", np.ones(4, np.int64)),
        node("Split", ["range_four", "one_of_four"], ["lo4_fixed", "R4_fixed", "lo8_fixed", "R8_fixed"], axis=0),
    ]


def _rounded() -> list[NodeProto]:
    """`x_rounded`, of X's shape: each column rounded as its part is."""
    return [
        constant("infinity", np.array(np.inf, np.float32)),
        constant("minus_infinity", np.array(-np.inf, np.float32)),
        constant("zero", np.array(0, np.float32)),
        constant("last_axis", np.array([-1], np.int64)),
        node("Not", ["is_eight"], ["is_four"]),
        *_part("4", "is_four"),
        *_part("8", "is_eight"),
        *_nearest("4"),
        *_steps("8"),
        node("Where", ["is_eight", "x8", "x4"], ["x_rounded"]),
    ]


def _part(part: str, mask: str) -> list[NodeProto]:
    """lo and R (..., 1) of the columns that `mask` (K,) marks, R < 0 without any, and `above` = X - lo of all."""
    p = f"part{part}_"
    return [
        node("Where", [mask, "X", "infinity"], [f"{p}or_high"]),
        node("Where", [mask, "X", "minus_infinity"], [f"{p}or_low"]),
        node("ReduceMin", [f"{p}or_high", "last_axis"], [f"{p}low"], keepdims=1),
        node("ReduceMax", [f"{p}or_low", "last_axis"], [f"{p}high"], keepdims=1),
        node("Sub", [f"{p}high", f"{p}low"], [f"{p}spread"]),
        node("Where", ["is_static", f"lo{part}_fixed", f"{p}low"], [f"lo{part}"]),
        node("Where", ["is_static", f"R{part}_fixed", f"{p}spread"], [f"R{part}"]),
        node("Sub", ["X", f"lo{part}"], [f"above{part}"]),
    ]


def _ratio(above: str, size: str, result: str) -> list[NodeProto]:
    """above / size, 0 where the size is not positive."""
    p = f"{result}_"
    return [
        node("Greater", [size, "zero"], [f"{p}defined"]),
        node("Div", [above, size], [f"{p}any"]),
        node("Where", [f"{p}defined", f"{p}any", "zero"], [result]),
    ]


def _nearest(part: str) -> list[NodeProto]:
    """`x4` = lo + R level: the level with as many midpoints strictly below u, found by bisection of the 15."""
    made = _ratio("above4", "R4", "u")
    index = None
    for step in (8, 4, 2, 1):
        p = f"step{step}_"
        middle = f"{p}middle"
        if index is None:
            made += [
                constant(f"{p}place", np.array(step - 1, np.int32)),
                node("Gather", ["midpoints", f"{p}place"], [middle], axis=0),
            ]
        else:
            made += [
                constant(f"{p}ahead", np.array(step - 1, np.int32)),
                node("Add", [index, f"{p}ahead"], [f"{p}place"]),
                node("Gather", ["midpoints", f"{p}place"], [middle], axis=0),
            ]
        made += [
            constant(f"{p}size", np.array(step, np.int32)),
            node("Greater", ["u", middle], [f"{p}above"]),
            node("Cast", [f"{p}above"], [f"{p}one"], to=TensorProto.INT32),
            node("Mul", [f"{p}one", f"{p}size"], [f"{p}more"]),
        ]
        if index is None:
            index = f"{p}more"
        else:
            made.append(node("Add", [index, f"{p}more"], [f"{p}index"]))
            index = f"{p}index"
    return [
        *made,
        node("Gather", ["sorted_levels", str(index)], ["level"], axis=0),
        node("Mul", [f"R{part}", "level"], ["above_rounded"]),
        node("Add", [f"lo{part}", "above_rounded"], [f"x{part}"]),
    ]


def _steps(part: str) -> list[NodeProto]:
    """`x8` = lo + (R / 255) q."""
    return [
        constant("steps", np.array(255, np.float32)),
        node("Div", [f"R{part}", "steps"], ["step"]),
        *_ratio(f"above{part}", "step", "q_exact"),
        node("Round", ["q_exact"], ["q_whole"]),
        node("Clip", ["q_whole", "zero", "steps"], ["q"]),
        node("Mul", ["step", "q"], ["q_times_step"]),
        node("Add", [f"lo{part}", "q_times_step"], [f"x{part}"]),
    ]
