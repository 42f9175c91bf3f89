"""Several BinaryMatMul, and the sum and RMS norm in front of them, as one operator of domain lit_binq.

    x = h / sqrt(mean(h^2) + epsilon) * gamma,  h = hidden + skip,  mean over the last dimension

Their bodies call BinaryMatMul, which a model must carry as well. Inputs are hidden float32 (..., K), skip float32 (...,
K), or (K,) for all rows (zeros where there is nothing to add), gamma float32 (K,), then for every linear the tensors of
BinaryMatMul: codes uint8 (N, ceil(K / 8)), row_scale float16 (N,), col_scale float16 (K,). Outputs are Y, and sum
float32 (..., K), which is h. Attributes of both: K (int), epsilon (float, at least 0), and `exact` (int, default 0), as
in `lit_binq_onnx.functions.bodies` the native operator's mode.
"""

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from lit_binq_onnx.functions.bodies import DOMAIN, OPSET, VERSION
from lit_binq_onnx.functions.pieces import constant, node

PRODUCT = "BinaryMatMul"
"""The operator that the bodies are made of."""


def tensors(suffix: str) -> list[str]:
    """Names of a linear's inputs."""
    return [f"{name}_{suffix}" for name in ("codes", "row_scale", "col_scale")]


def norm_binary_matmul_qkv_function() -> FunctionProto:
    """lit_binq.NormBinaryMatMulQKV: Y = [Q, K, V] (..., Nq + Nk + Nv), three BinaryMatMul of x, each with its own bias.

    Inputs after gamma: the tensors of q, of k, of v, then bias_q, bias_k, bias_v float32, which a node may leave out.
    """
    body = [_product("x", name, name, "K", f"bias_{name}") for name in "qkv"]
    body.append(node("Concat", ["q", "k", "v"], ["Y"], axis=-1))
    biases = [f"bias_{name}" for name in "qkv"]
    return _function("NormBinaryMatMulQKV", [*(t for name in "qkv" for t in tensors(name)), *biases], body, ["K"])


def norm_binary_gated_mlp_function() -> FunctionProto:
    """lit_binq.NormBinaryGatedMLP: Y = down(silu(gate(x)) * up(x)), three BinaryMatMul without bias.

    Inputs after gamma: the tensors of gate (H, K), of up (H, K), of down (N, H). One more attribute: H.
    """
    body = [
        _product("x", "gate", "gate", "K"),
        _product("x", "up", "up", "K"),
        node("Sigmoid", ["gate"], ["sigmoid"]),
        node("Mul", ["gate", "sigmoid"], ["opened"]),
        node("Mul", ["opened", "up"], ["gated"]),
        _product("gated", "Y", "down", "H"),
    ]
    names = [t for name in ("gate", "up", "down") for t in tensors(name)]
    return _function("NormBinaryGatedMLP", names, body, ["K", "H"])


def _norm() -> list[NodeProto]:
    """`sum` and `x`, in the nodes that ONNX Runtime makes one of while it loads a model."""
    epsilon = node("Constant", [], ["added"])
    epsilon.attribute.append(
        AttributeProto(name="value_float", ref_attr_name="epsilon", type=AttributeProto.FLOAT),
    )
    return [
        constant("two", np.array(2, np.float32)),
        constant("last_axis", np.array([-1], np.int64)),
        epsilon,
        node("Add", ["hidden", "skip"], ["sum"]),
        node("Pow", ["sum", "two"], ["squares"]),
        node("ReduceMean", ["squares", "last_axis"], ["mean"], keepdims=1),
        node("Add", ["mean", "added"], ["variance"]),
        node("Sqrt", ["variance"], ["deviation"]),
        node("Div", ["sum", "deviation"], ["normalized"]),
        node("Mul", ["normalized", "gamma"], ["x"]),
    ]


def _product(x: str, y: str, suffix: str, columns: str, bias: str = "") -> NodeProto:
    """A BinaryMatMul whose K is the function's attribute `columns`."""
    made = node(PRODUCT, [x, *tensors(suffix), *([bias] if bias else [])], [y], domain=DOMAIN)
    for name, of_function in (("K", columns), ("exact", "exact")):
        made.attribute.append(AttributeProto(name=name, ref_attr_name=of_function, type=AttributeProto.INT))
    return made


def _function(name: str, inputs: list[str], body: list[NodeProto], attributes: list[str]) -> FunctionProto:
    return helper.make_function(
        DOMAIN,
        name,
        ["hidden", "skip", "gamma", *inputs],
        ["Y", "sum"],
        [*_norm(), *body],
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        attributes=[*attributes, "epsilon"],
        attribute_protos=[helper.make_attribute("exact", 0)],
    )
