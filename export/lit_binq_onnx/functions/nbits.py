"""The operator lit_binq.NBitsMatMul, a product with a table of 4 or 8 bits, as com.microsoft.MatMulNBits.

Its tensors are those of MatMulNBits. Unlike other bodies this one is no standard ONNX, and it rounds its input to int8
as the native operator does: an attribute of a node within a body cannot depend on `exact`, so whoever wants float32
activations of it sets the accuracy level in the body (`lit_binq_onnx.runtime.session`).
"""

from onnx import AttributeProto, FunctionProto, helper

from lit_binq_onnx.functions.bodies import DOMAIN, MICROSOFT, OPSET
from lit_binq_onnx.functions.pieces import node

ACCURACY = 4
"""accuracy_level of MatMulNBits: 4 rounds activations to int8, 1 keeps float32 (for exact comparisons; slow)."""

NBITS = "NBitsMatMul"
"""The operator's name."""

_NUMBERS = ("K", "N", "bits", "block_size")


def nbits_matmul_function() -> FunctionProto:
    """lit_binq.NBitsMatMul: Y = X W^T, W_nj = s[n, g] (q_nj - z[n, g]) with g = j // block_size.

    Inputs: X float32 (..., K); codes uint8 (N, G, block_size bits / 8), G = ceil(K / block_size); scales float32 (N, G)
    or (N G,); zero_points uint8 (N, ceil(G bits / 8)), which a node may leave out: 2^(bits - 1). Output: Y float32
    (..., N). Attributes: K, N, bits (4 or 8), block_size (a power of two from 16 to 256), exact.
    """
    inputs = ["X", "codes", "scales", "zero_points"]
    product = node("MatMulNBits", inputs, ["Y"], domain=MICROSOFT, accuracy_level=ACCURACY)
    for name in _NUMBERS:
        product.attribute.append(AttributeProto(name=name, ref_attr_name=name, type=AttributeProto.INT))
    return helper.make_function(
        DOMAIN,
        NBITS,
        inputs,
        ["Y"],
        [product],
        [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        attributes=list(_NUMBERS),
        attribute_protos=[helper.make_attribute("exact", 0)],
    )
