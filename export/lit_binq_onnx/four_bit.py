"""The rival of `litbinq bench shape`: the same model as a graph of ONNX Runtime's own operators with 4-bit weights.

What ONNX Runtime offers at its best for a LLaMA-like model on a CPU, and nothing of ours:

    MatMulNBits                                 every linear, symmetric (a zero point would cost more), activations
                                                rounded to int8 (accuracy_level 4, the fastest), float32 scales
    one MatMulNBits for q, k and v              as wide as the three; attention reads its output packed
    gate, up, Sigmoid, Mul, Mul, down           the runtime fuses Sigmoid and Mul
    GroupQueryAttention, SkipSimplifiedLayerNormalization, GatherBlockQuantized

Weights are random, made and written one linear at a time. The graph has the inputs and outputs that
`lit_binq_onnx.fused` describes, so that the same loop runs it.

Legend: K columns, N rows of a weight, g block, h hidden, x normalized hidden.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq_onnx.functions import DOMAIN
from lit_binq_onnx.fused import FusedBuilder
from lit_binq_onnx.head import ACCURACY, MICROSOFT, Tables
from lit_binq_onnx.session import LOGITS_START
from lit_binq_onnx.tensors import DataFile

BLOCKS = (16, 32, 64, 128, 256)
"""Block lengths of MatMulNBits."""

_CODE_SIZE = 4.6  # standard deviation of even codes from -8 to 7


class FourBitBuilder(FusedBuilder):
    """The graph; see this file's head.

    Args:
        model: whose shapes, norms and biases count; not the packed weights.
        tables: rounded embedding and head, or None.
        data: where tensors go.
        block: g.
        seed: of the weights.

    Attributes:
        stored_bits: of the linears so far: codes with their padding, and scales.
    """

    def __init__(
        self, model: PreTrainedModel, tables: Tables | None, data: DataFile, *, block: int = 32, seed: int = 2
    ) -> None:
        super().__init__(model, tables, data)
        self._block, self._rng, self.stored_bits = block, np.random.default_rng(seed), 0

    def build(self) -> onnx.ModelProto:
        """All of it."""
        blocks = self.model.model.layers
        self._lengths()
        self._angles()
        h = self._embedding()
        x = self._norm(blocks[0].input_layernorm, h, "model.layers.0.input_layernorm")
        for number, block in enumerate(blocks):
            name = f"model.layers.{number}"
            y = self._attention(block.self_attn, x, number)
            h, x = self._skip_norm(block.post_attention_layernorm, h, y, f"{name}.post_attention_layernorm")
            y = self._mlp(block.mlp, x, f"{name}.mlp")
            last = number + 1 == len(blocks)
            norm = self.model.model.norm if last else blocks[number + 1].input_layernorm
            label = "model.norm" if last else f"model.layers.{number + 1}.input_layernorm"
            h, x = self._skip_norm(norm, h, y, label)
        self._head(x)
        proto = self.g.model(*self._interface(len(blocks)))
        proto.graph.input.append(helper.make_tensor_value_info(LOGITS_START, TensorProto.INT64, [1]))
        foreign = [i for i, opset in enumerate(proto.opset_import) if opset.domain == DOMAIN]
        for i in reversed(foreign):  # a runtime without our library need not have heard of it
            del proto.opset_import[i]
        return proto

    def _lengths(self) -> None:
        """Each row's last position, and the length of the longest row: what GroupQueryAttention asks for."""
        g = self.g
        rows = g.add("ReduceSum", ["attention_mask", g.stored("axis 1", np.array([1]))], "row_tokens", keepdims=0)
        last = g.add("Sub", [rows, g.stored("one", np.array(1))], "row_last")
        g.add("Cast", [last], "last_positions", to=TensorProto.INT32)
        shape = g.add("Shape", ["attention_mask"], "mask_shape")
        total = g.add("Gather", [shape, g.stored("one", np.array(1))], "longest", axis=0)
        g.add("Cast", [total], "total_tokens", to=TensorProto.INT32)

    def _norm(self, norm: Any, h: str, name: str) -> str:
        weight = self.g.stored(f"{name}.weight", norm.weight.detach().numpy())
        epsilon = float(norm.variance_epsilon)
        return self.g.add("SimplifiedLayerNormalization", [h, weight], name, epsilon=epsilon, axis=-1)

    def _skip_norm(self, norm: Any, h: str, y: str, name: str) -> tuple[str, str]:
        """(h + y, its norm)."""
        weight = self.g.stored(f"{name}.weight", norm.weight.detach().numpy())
        x, _, _, total = self.g.add_many(
            "SkipSimplifiedLayerNormalization",
            [h, y, weight],
            [name, "", "", f"{name}.input"],
            domain=MICROSOFT,
            epsilon=float(norm.variance_epsilon),
        )
        return total, x

    def _attention(self, attention: Any, x: str, number: int) -> str:
        g, name = self.g, f"model.layers.{number}.self_attn"
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        if getattr(attention, "q_norm", None) is None:
            q, k, v = self._linear(layers, x, f"{name}.qkv"), "", ""
        else:
            parts = zip(layers, "qkv", strict=True)
            q, k, v = (self._linear([layer], x, f"{name}.{part}_proj") for layer, part in parts)
            q = self._head_norm(attention.q_norm, q, f"{name}.q_norm", heads, attention.head_dim)
            k = self._head_norm(attention.k_norm, k, f"{name}.k_norm", kv_heads, attention.head_dim)
        past, present = f"past_key_values.{number}", f"present.{number}"
        inputs = [q, k, v, f"{past}.key", f"{past}.value", "last_positions", "total_tokens", "cos", "sin"]
        outputs = g.add_many(
            "GroupQueryAttention",
            inputs,
            [f"{name}.heads", f"{present}.key", f"{present}.value"],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=float(attention.scaling),
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=self._window(number),
        )
        return self._linear([attention.o_proj], outputs[0], f"{name}.o_proj")

    def _mlp(self, mlp: Any, x: str, name: str) -> str:
        g = self.g
        gate, up = (self._linear([getattr(mlp, part)], x, f"{name}.{part}") for part in ("gate_proj", "up_proj"))
        opened = g.add("Mul", [gate, g.add("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.act_fn")
        return self._linear([mlp.down_proj], g.add("Mul", [opened, up], f"{name}.gated"), f"{name}.down_proj")

    def _linear(self, layers: Sequence[PackedLinear], x: str, name: str) -> str:
        """Linears of one input as one product, their outputs beside each other, and their biases if there are any."""
        K, N, g = layers[0].in_features, sum(layer.out_features for layer in layers), self._block
        groups = -(-K // g)
        codes = np.frombuffer(self._rng.bytes(N * groups * g // 2), np.uint8).reshape(N, groups, g // 2)
        scales = (0.5 + self._rng.random((N, groups), np.float32)) * np.float32(K**-0.5 / _CODE_SIZE)
        self.stored_bits += 8 * (codes.nbytes + scales.nbytes)
        # flat scales are what every version of the runtime takes
        y = self._product(x, K, N, 4, g, [("codes", codes), ("scales", scales.reshape(-1))], name)
        if all(layer.bias is None for layer in layers):
            return y
        biases = [np.zeros(m.out_features) if m.bias is None else m.bias.float().numpy() for m in layers]
        bias = self.g.stored(f"{name}.bias", np.concatenate(biases).astype(np.float32))
        return self.g.add("Add", [y, bias], f"{name}.biased")

    def _product(
        self,
        x: str,
        K: int,
        N: int,
        bits: int,
        block: int,
        tensors: list[tuple[str, np.ndarray]],
        name: str,
        y: str = "",
    ) -> str:
        """A MatMulNBits; tensors are codes, scales and zero points where there are any, by the ends of their names."""
        return self.g.add(
            "MatMulNBits",
            [x, *(self.g.stored(f"{name}.{label}", array) for label, array in tensors)],
            y or name,
            domain=MICROSOFT,
            K=K,
            N=N,
            bits=bits,
            block_size=block,
            accuracy_level=ACCURACY,
        )

    def _head(self, x: str) -> None:
        g = self.g
        bounds = [
            g.stored(LOGITS_START, np.array([0])),
            g.stored("end", np.array([np.iinfo(np.int64).max])),
            g.stored("axis 1", np.array([1])),
        ]
        x = g.add("Slice", [x, *bounds], "last_hidden")
        if self.tables is None:
            g.add("MatMul", [x, self._dense_head()], "logits")
            return
        table = self.tables.head
        name = "embedding" if self.tables.embedding is table else "head"
        tensors = [("blocks", table.blocked()), ("scales", table.scales)]
        if table.zeros is not None:
            tensors.append(("zeros", table.zeros))
        self._product(x, table.width, len(table.codes), table.bits, table.block, tensors, name, "logits")


def require_block(block: int) -> None:
    """Refuse a block length that MatMulNBits does not take."""
    if block not in BLOCKS:
        raise LitBinqError(f"block: got {block}, expected one of {', '.join(map(str, BLOCKS))}")
