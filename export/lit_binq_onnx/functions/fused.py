"""Several BinaryMatMul and what stands between them as one operator of domain lit_binq.

Their bodies call BinaryMatMul, which a model must carry as well. Inputs are X float32 (..., K), then for every linear
the tensors of BinaryMatMul: codes uint8 (N, ceil(K / 8)), row_scale float16 (N,), col_scale float16 (K,). As in
`lit_binq_onnx.functions.bodies`, `exact` (int, default 0) is the native operator's mode.
"""

from onnx import AttributeProto, FunctionProto, NodeProto, helper

from lit_binq_onnx.functions.bodies import DOMAIN, OPSET, VERSION
from lit_binq_onnx.functions.pieces import node

PRODUCT = "BinaryMatMul"
"""The operator that the bodies are made of."""


def tensors(suffix: str) -> list[str]:
    """Names of a linear's inputs."""
    return [f"{name}_{suffix}" for name in ("codes", "row_scale", "col_scale")]


def binary_matmul_qkv_function() -> FunctionProto:
    """lit_binq.BinaryMatMulQKV: Y = [Q, K, V] (..., Nq + Nk + Nv), three BinaryMatMul of X, each with its own bias.

    Inputs after X: the tensors of q, of k, of v, then bias_q, bias_k, bias_v float32, which a node may leave out.
    """
    body = [_product("X", name, name, "K", f"bias_{name}") for name in "qkv"]
    body.append(node("Concat", ["q", "k", "v"], ["Y"], axis=-1))
    biases = [f"bias_{name}" for name in "qkv"]
    return _function("BinaryMatMulQKV", [*(t for name in "qkv" for t in tensors(name)), *biases], body, ["K"])


def binary_gated_mlp_function() -> FunctionProto:
    """lit_binq.BinaryGatedMLP: Y = down(silu(gate(X)) * up(X)), three BinaryMatMul without bias.

    Inputs after X: the tensors of gate (H, K), of up (H, K), of down (N, H). Attributes: K, H.
    """
    body = [
        _product("X", "gate", "gate", "K"),
        _product("X", "up", "up", "K"),
        node("Sigmoid", ["gate"], ["sigmoid"]),
        node("Mul", ["gate", "sigmoid"], ["opened"]),
        node("Mul", ["opened", "up"], ["gated"]),
        _product("gated", "Y", "down", "H"),
    ]
    names = [t for name in ("gate", "up", "down") for t in tensors(name)]
    return _function("BinaryGatedMLP", names, body, ["K", "H"])


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
        ["X", *inputs],
        ["Y"],
        body,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        attributes=attributes,
        attribute_protos=[helper.make_attribute("exact", 0)],
    )
