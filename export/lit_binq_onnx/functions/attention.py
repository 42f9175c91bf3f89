"""Attention over a cache as an operator of domain lit_binq.

Legend: b batch, s new tokens, d width of a head, c room of the cache, t tokens of the longest row, P positions.
"""

from onnx import AttributeProto, FunctionProto, helper

from lit_binq_onnx.functions.bodies import DOMAIN, MICROSOFT, OPSET
from lit_binq_onnx.functions.pieces import node


def cached_attention_function() -> FunctionProto:
    """lit_binq.CachedAttention: the runtime's GroupQueryAttention with rotary embedding, its inputs in another order.

    Inputs: query float32 (b, s, heads * d), or (b, s, (heads + 2 kv) * d) with key and value left out; past_key,
    past_value float32 (b, kv, c, d); last_positions int32 (b,), tokens of each row with the new ones, less one;
    total_tokens int32 (), t; cos, sin float32 (P, d / 2); key, value float32 (b, s, kv * d), optional.

    Outputs: heads float32 (b, s, heads * d); present_key, present_value float32 (b, kv, max(c, t), d).

    Attributes: num_heads, kv_num_heads, scale, local_window_size (default -1: all tokens).

    What may be left out comes last, as in every operator of the domain. Where ONNX Runtime before 1.24 runs the body, a
    window has a token more, and before 1.20 a prompt must be read in one part: `session` does not run it there.
    """
    attention = node(
        "GroupQueryAttention",
        ["query", "key", "value", "past_key", "past_value", "last_positions", "total_tokens", "cos", "sin"],
        ["heads", "present_key", "present_value"],
        domain=MICROSOFT,
        do_rotary=1,
        rotary_interleaved=0,
    )
    kinds = {"num_heads": AttributeProto.INT, "kv_num_heads": AttributeProto.INT, "scale": AttributeProto.FLOAT}
    for name, kind in (kinds | {"local_window_size": AttributeProto.INT}).items():
        attention.attribute.append(AttributeProto(name=name, ref_attr_name=name, type=kind))
    return helper.make_function(
        DOMAIN,
        "CachedAttention",
        ["query", "past_key", "past_value", "last_positions", "total_tokens", "cos", "sin", "key", "value"],
        ["heads", "present_key", "present_value"],
        [attention],
        [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        attributes=list(kinds),
        attribute_protos=[helper.make_attribute("local_window_size", -1)],
    )
