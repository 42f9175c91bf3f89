"""LLaMA-like models as a graph of fused operators, written from the modules rather than traced.

    inputs   input_ids (b, s) int64, attention_mask (b, t) int64, past_key_values.N.key / .value (b, heads, c, head_dim)
    outputs  logits (b, s, V), present.N.key / .value (b, heads, c, head_dim)

t is the longest row with its new tokens. A row of the mask is ones, then zeros: its sum is how many tokens the row has,
and its new ones are the last of them. The cache has room for c >= t tokens. Attention writes new keys and values into
the buffers that come in, where a caller binds the same memory to past and present: nothing grows, nothing is copied.
Padding on the left cannot be said in this form: the traced graph does that.

Operators of ONNX Runtime: SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization (h + y and its norm in one),
GatherBlockQuantized where the tables are rounded. The initializer `logits_start` is an optional input: -1 asks for the
last token's logits only, which saves the head's work over a prompt.

Operators of ours: CachedAttention (rotary embedding, grouped heads without repeating keys, sliding window), which is
the runtime's GroupQueryAttention where the native library is missing; NBitsMatMul for a rounded head, MatMulNBits
there. Where q, k and v are all of the row x column format, they are one NormBinaryMatMulQKV, whose output attention
reads as it is, and gate, up and down are one NormBinaryGatedMLP where they have no biases. Both do the residual sum and
the norm in front of them too: a node costs the runtime microseconds, which is what a small linear takes, and a norm a
tenth of one. Every linear keeps column scales of its own. Other formats, and heads that are normalized one by one, keep
a node for every product.

What is written here is believed only after its logits were compared with torch's (`lit_binq_onnx.build.export`).

Legend: b batch, s new tokens, h hidden, y what the next norm adds to it first ("": nothing), x normalized hidden.
"""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from transformers import PreTrainedModel

from lit_binq.formats import PackedLinear
from lit_binq.models.kv_cache import kv_bits
from lit_binq_onnx.build.graph import HALF_STORAGE_ELEMENTS
from lit_binq_onnx.build.head import MICROSOFT, QuantizedTable, Tables
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.build.writer import GraphWriter, NormedRows, one_operator
from lit_binq_onnx.functions import DOMAIN, NBITS
from lit_binq_onnx.runtime.session import LOGITS_START, cache_names

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Blocks of RMS norm, rotary attention, RMS norm and gated MLP."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on the length of the text."""

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_EMBEDDING = "model.embed_tokens.weight"
_ALL = np.iinfo(np.int64).max


def unfusable_reason(model: PreTrainedModel) -> str | None:
    """Why this route does not fit a model, in a few words; None if it seems to."""
    config: Any = model.config
    if type(model).__name__ not in ARCHITECTURES:
        return f"{type(model).__name__} is none of {', '.join(ARCHITECTURES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}, expected silu"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"rotary embedding {rope!r}, expected one of {', '.join(STATIC_ROPE)}"
    if getattr(config, "max_position_embeddings", None) is None:
        return "no max_position_embeddings in the configuration"
    if kv_bits(model):
        return f"keys and values of {kv_bits(model)} bits"
    for number, block in enumerate(model.model.layers):
        for name in _PROJECTIONS:
            if not isinstance(block.get_submodule(name), PackedLinear):
                return f"block {number}: {name} is not packed"
        head_dim = block.self_attn.head_dim
        if head_dim % 16:
            return f"head_dim {head_dim}, expected a multiple of 16"
    if getattr(model.lm_head, "bias", None) is not None:
        return "the head has a bias"
    return None


@torch.no_grad()
def rotary_table(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """cos and sin (positions, head_dim / 2) float32, from the model's own module, which knows its scaling."""
    where = torch.arange(model.config.max_position_embeddings)[None]
    tables = model.model.rotary_emb(torch.zeros(1), where)
    half = tables[0].shape[-1] // 2
    return {name: table[0, :, :half].numpy() for name, table in zip(("cos", "sin"), tables, strict=True)}


class FusedBuilder:
    """The graph of one model; see this file's head."""

    def __init__(self, model: PreTrainedModel, tables: Tables | None, data: DataFile) -> None:
        self.model, self.tables = model, tables
        self.config: Any = model.config
        self.g = GraphWriter(data)

    def build(self) -> onnx.ModelProto:
        """All of it."""
        g, blocks = self.g, self.model.model.layers
        self._lengths()
        self._angles()
        h, y = self._embedding(), ""
        for number, block in enumerate(blocks):
            h, heads = self._projections(block, h, y, f"model.layers.{number}")
            y = self._attention(block.self_attn, heads, number)
            h, y = self._mlp(block, h, y, f"model.layers.{number}")
        _, x = self._skip_norm(self.model.model.norm, h, y, "model.norm")
        self._head(x)
        proto = g.model(*self._interface(len(blocks)))
        # An initializer that is an input too is a default that a caller may replace.
        proto.graph.input.append(helper.make_tensor_value_info(LOGITS_START, TensorProto.INT64, [1]))
        return proto

    def _interface(self, blocks: int) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """Inputs and outputs."""
        info, attention = helper.make_tensor_value_info, self.model.model.layers[0].self_attn
        heads = self.config.num_key_value_heads
        cache = ["batch", heads, "capacity", attention.head_dim]
        past, present = cache_names(blocks)
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *(info(name, TensorProto.FLOAT, cache) for name in past),
        ]
        size = ["batch", "last tokens", self.config.vocab_size]
        outputs = [info("logits", TensorProto.FLOAT, size), *(info(n, TensorProto.FLOAT, cache) for n in present)]
        return inputs, outputs

    def _lengths(self) -> None:
        """From the mask what attention asks for: each row's last position, and t."""
        g = self.g
        rows = g.add("ReduceSum", ["attention_mask", g.stored("axis 1", np.array([1]))], "row_tokens", keepdims=0)
        last = g.add("Sub", [rows, g.stored("one", np.array(1))], "row_last")
        g.add("Cast", [last], "last_positions", to=TensorProto.INT32)
        shape = g.add("Shape", ["attention_mask"], "mask_shape")
        total = g.add("Gather", [shape, g.stored("one", np.array(1))], "longest", axis=0)
        g.add("Cast", [total], "total_tokens", to=TensorProto.INT32)

    def _angles(self) -> None:
        for name, table in rotary_table(self.model).items():
            self.g.stored(name, table)

    def _norm(self, norm: Any, h: str, name: str) -> str:
        weight = self.g.stored(f"{name}.weight", _array(norm.weight))
        return self.g.add("SimplifiedLayerNormalization", [h, weight], name, epsilon=_epsilon(norm), axis=-1)

    def _skip_norm(self, norm: Any, h: str, y: str, name: str) -> tuple[str, str]:
        """(h + y, its norm); (h, its norm) where y is ""."""
        if not y:
            return h, self._norm(norm, h, name)
        weight = self.g.stored(f"{name}.weight", _array(norm.weight))
        x, _, _, total = self.g.add_many(
            "SkipSimplifiedLayerNormalization",
            [h, y, weight],
            [name, "", "", f"{name}.input"],
            domain=MICROSOFT,
            epsilon=_epsilon(norm),
        )
        return total, x

    def _rows(self, norm: Any, h: str, y: str, name: str) -> NormedRows:
        """The same, for an operator that adds and normalizes by itself."""
        return NormedRows(h, y, self.g.stored(f"{name}.weight", _array(norm.weight)), _epsilon(norm))

    def _projections(self, block: Any, h: str, y: str, name: str) -> tuple[str, tuple[str, str, str]]:
        """(h + y, what attention takes as q, k and v); q alone where it holds all three."""
        g, attention, parts = self.g, block.self_attn, ("q_proj", "k_proj", "v_proj")
        norm = (block.input_layernorm, h, y, f"{name}.input_layernorm")
        layers, names = [getattr(attention, p) for p in parts], [f"{name}.self_attn.{p}" for p in parts]
        # o_proj too: where bodies run, ONNX Runtime 1.18 infers an attention output as wide as the packed query, which
        # its body bears.
        if not _normalizes_heads(attention) and one_operator([*layers, attention.o_proj], biases=True):
            q, h = g.qkv(layers, self._rows(*norm), names, f"{name}.self_attn.qkv")
            return h, (q, "", "")
        h, x = self._skip_norm(*norm)
        q, k, v = (self._linear(layer, x, n) for layer, n in zip(layers, names, strict=True))
        return h, (q, k, v)

    def _attention(self, attention: Any, projections: tuple[str, str, str], number: int) -> str:
        name = f"model.layers.{number}.self_attn"
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = projections
        if _normalizes_heads(attention):
            q = self._head_norm(attention.q_norm, q, f"{name}.q_norm", heads, attention.head_dim)
            k = self._head_norm(attention.k_norm, k, f"{name}.k_norm", kv_heads, attention.head_dim)
        x = self._attend(q, k, v, number, scale=float(attention.scaling), num_heads=heads, kv_num_heads=kv_heads)
        return self._linear(attention.o_proj, x, f"{name}.o_proj")

    def _attend(self, q: str, k: str, v: str, number: int, **attributes: Any) -> str:
        """The heads' outputs side by side; k and v are "" where q holds all three."""
        past, present = f"past_key_values.{number}", f"present.{number}"
        inputs = [q, f"{past}.key", f"{past}.value", "last_positions", "total_tokens", "cos", "sin"]
        outputs = [f"model.layers.{number}.self_attn.heads", f"{present}.key", f"{present}.value"]
        inputs += [k, v] if k else []
        attributes["local_window_size"] = self._window(number)
        return self.g.add_many("CachedAttention", inputs, outputs, domain=DOMAIN, **attributes)[0]

    def _linear(self, layer: PackedLinear, x: str, name: str) -> str:
        """One product."""
        return self.g.linear(layer, x, name)

    def _window(self, number: int) -> int:
        """How many tokens a token sees, itself included; -1 means all."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if window is None or (kinds is not None and kinds[number] != "sliding_attention"):
            return -1
        return int(window)

    def _head_norm(self, norm: Any, q: str, name: str, heads: int, head_dim: int) -> str:
        """Queries or keys normalized head by head."""
        g = self.g
        split = g.add("Reshape", [q, g.stored(f"to heads {heads}", np.array([0, 0, heads, head_dim]))], f"{name}.split")
        width = g.stored(f"to width {heads}", np.array([0, 0, heads * head_dim]))
        return g.add("Reshape", [self._norm(norm, split, f"{name}.heads"), width], name)

    def _mlp(self, block: Any, h: str, y: str, name: str) -> tuple[str, str]:
        """(h + y, the MLP's output)."""
        g, parts = self.g, ("gate_proj", "up_proj", "down_proj")
        norm = (block.post_attention_layernorm, h, y, f"{name}.post_attention_layernorm")
        name = f"{name}.mlp"
        layers, names = [getattr(block.mlp, p) for p in parts], [f"{name}.{p}" for p in parts]
        if one_operator(layers, biases=False):
            y, h = g.gated_mlp(layers, self._rows(*norm), names, name)
            return h, y
        h, x = self._skip_norm(*norm)
        gate, up = (self._linear(layer, x, n) for layer, n in zip(layers[:2], names[:2], strict=True))
        opened = g.add("Mul", [gate, g.add("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.act_fn")
        return h, self._linear(layers[2], g.add("Mul", [opened, up], f"{name}.gated"), names[2])

    def _embedding(self) -> str:
        g = self.g
        if self.tables is None:
            dense = self._half(_array(self.model.model.embed_tokens.weight), _EMBEDDING)
            return g.add("Gather", [dense, "input_ids"], "hidden", axis=0)
        table = self.tables.embedding
        return g.add(
            "GatherBlockQuantized",
            [g.stored("embedding.codes", table.codes), "input_ids", *self._scales(table, "embedding")],
            "hidden",
            domain=MICROSOFT,
            bits=table.bits,
            block_size=table.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def _head(self, x: str) -> None:
        g = self.g
        bounds = [
            g.stored(LOGITS_START, np.array([0])),
            g.stored("end", np.array([_ALL])),
            g.stored("axis 1", np.array([1])),
        ]
        x = g.add("Slice", [x, *bounds], "last_hidden")
        if self.tables is None:
            g.add("MatMul", [x, self._dense_head()], "logits")
            return
        self._rounded_product(x, self.tables.head, "embedding" if self.tables.embedding is self.tables.head else "head")

    def _rounded_product(self, x: str, table: QuantizedTable, name: str) -> None:
        """The logits."""
        inputs = [x, self.g.stored(f"{name}.blocks", table.blocked()), *self._scales(table, name)]
        self.g.add(NBITS, inputs, "logits", domain=DOMAIN, **table_attributes(table))

    def _dense_head(self) -> str:
        """(hidden, V), in the order of bytes in which the traced graph has stored it."""
        weight = self.model.lm_head.weight
        tied = weight is self.model.model.embed_tokens.weight
        transposed = np.ascontiguousarray(_array(weight).T)
        if not tied and any(self.g.data.holds(stored) for stored in (transposed, _as_half(transposed))):
            return self._half(transposed, "lm_head.transposed")
        # The runtime transposes it while loading, see `lit_binq_onnx.build.export`.
        table = self._half(_array(weight), _EMBEDDING if tied else "lm_head.weight")
        return self.g.add("Transpose", [table], "lm_head.transposed", perm=[1, 0])

    def _scales(self, table: QuantizedTable, name: str) -> list[str]:
        """Scales and, where there are any, zero points."""
        scales = [self.g.stored(f"{name}.scales", table.scales)]
        return scales if table.zeros is None else [*scales, self.g.stored(f"{name}.zeros", table.zeros)]

    def _half(self, full: np.ndarray, name: str) -> str:
        """A float32 table, stored as float16 with a Cast where that loses nothing (`graph.store_half`)."""
        if f"{name}.float32" in (node.output[0] for node in self.g.nodes):
            return f"{name}.float32"
        half = _as_half(full)
        if full.size < HALF_STORAGE_ELEMENTS or not np.array_equal(half.astype(np.float32), full):
            return self.g.stored(name, full)
        return self.g.add("Cast", [self.g.stored(f"{name}.float16", half)], f"{name}.float32", to=TensorProto.FLOAT)


def table_attributes(table: QuantizedTable) -> dict[str, int]:
    """Attributes of a product with a rounded table."""
    return {"K": table.width, "N": len(table.codes), "bits": table.bits, "block_size": table.block}


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    return array


def _as_half(full: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes inf and is refused by comparison
        half: np.ndarray = full.astype(np.float16)
    return half


def _normalizes_heads(attention: Any) -> bool:
    return getattr(attention, "q_norm", None) is not None


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon)


def build_fused(model: PreTrainedModel, tables: Tables | None, data: DataFile) -> onnx.ModelProto:
    """The fused graph of a packed model that `unfusable_reason` says nothing against.

    Args:
        model: float32 on the CPU.
        tables: rounded embedding and head, or None.
        data: where tensors go; what is in it already is not written again.

    Returns:
        A model whose external data is in `data`.
    """
    return FusedBuilder(model, tables, data).build()
