"""Function bodies: the operators of domain lit_binq written in standard ONNX operators.

A model that carries them runs on any ONNX Runtime: without the native library the runtime inlines the body,
with the library registered it runs the native operator. Knows ONNX only.
"""

from collections.abc import Callable

import onnx
from onnx import FunctionProto, helper

from lit_binq_onnx.functions.attention import cached_attention_function
from lit_binq_onnx.functions.bodies import (
    DOMAIN,
    MICROSOFT,
    OPSET,
    VERSION,
    binary_matmul_function,
    grouped_binary_matmul_function,
)
from lit_binq_onnx.functions.fused import PRODUCT, norm_binary_gated_mlp_function, norm_binary_matmul_qkv_function
from lit_binq_onnx.functions.nbits import ACCURACY, NBITS, nbits_matmul_function
from lit_binq_onnx.functions.two_plane import two_plane_matmul_function

BODIES: dict[str, Callable[[], FunctionProto]] = {
    "BinaryMatMul": binary_matmul_function,
    "GroupedBinaryMatMul": grouped_binary_matmul_function,
    "TwoPlaneMatMul": two_plane_matmul_function,
}
"""Every operator of the domain that is one linear layer, by its name."""

FUSED_BODIES: dict[str, Callable[[], FunctionProto]] = {
    "NormBinaryGatedMLP": norm_binary_gated_mlp_function,
    "NormBinaryMatMulQKV": norm_binary_matmul_qkv_function,
}
"""Every operator of the domain that is several of them; their bodies call `BODIES["BinaryMatMul"]`."""

TABLE_BODIES: dict[str, Callable[[], FunctionProto]] = {NBITS: nbits_matmul_function}
"""Every operator of the domain that multiplies by a table of several bits."""

OTHER_BODIES: dict[str, Callable[[], FunctionProto]] = {"CachedAttention": cached_attention_function}
"""Every operator of the domain without weights."""

CONTRIBUTED = TABLE_BODIES.keys() | OTHER_BODIES.keys()
"""Operators whose bodies call the runtime's own operators, of domain `MICROSOFT`."""


def add_functions(model: onnx.ModelProto) -> None:
    """Add the bodies of the operators a model uses, in place, and declare their domains where they are missing.

    Bodies of the same name are replaced.
    """
    bodies = BODIES | FUSED_BODIES | TABLE_BODIES | OTHER_BODIES
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN} & bodies.keys()
    if used & FUSED_BODIES.keys():
        used.add(PRODUCT)
    kept = [f for f in model.functions if f.domain != DOMAIN or f.name not in used]
    del model.functions[:]
    model.functions.extend([*kept, *(bodies[name]() for name in sorted(used))])
    domains = {DOMAIN: VERSION} | ({MICROSOFT: 1} if used & CONTRIBUTED else {})
    for domain, version in domains.items():
        if all(opset.domain != domain for opset in model.opset_import):
            model.opset_import.append(helper.make_opsetid(domain, version))


__all__ = [
    "ACCURACY",
    "BODIES",
    "DOMAIN",
    "FUSED_BODIES",
    "MICROSOFT",
    "NBITS",
    "OPSET",
    "OTHER_BODIES",
    "TABLE_BODIES",
    "VERSION",
    "add_functions",
    "binary_matmul_function",
    "cached_attention_function",
    "grouped_binary_matmul_function",
    "nbits_matmul_function",
    "norm_binary_gated_mlp_function",
    "norm_binary_matmul_qkv_function",
    "two_plane_matmul_function",
]
