"""The baseline of `litbinq bench shape`: the same model as a graph of ONNX Runtime's own operators with 4-bit weights.

What ONNX Runtime offers at its best for a LLaMA-like model on a CPU, and nothing of ours:

    MatMulNBits                                 every linear, symmetric (a zero point would cost more), activations
                                                rounded to int8 (accuracy_level 4, the fastest), float32 scales
    one MatMulNBits for q, k and v              as wide as the three; attention reads its output packed
    gate, up, Sigmoid, Mul, Mul, down           the runtime fuses Sigmoid and Mul
    GroupQueryAttention, SkipSimplifiedLayerNormalization, GatherBlockQuantized

Weights are random, made and written one linear at a time. The graph has the inputs and outputs that
`lit_binq_onnx.build.fused` describes, so that the same loop runs it.

Legend: K columns, N rows of a weight, g block, h hidden, x normalized hidden.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq_onnx.build.fused import FusedBuilder, table_attributes
from lit_binq_onnx.build.head import MICROSOFT, QuantizedTable, Tables
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.functions import DOMAIN
from lit_binq_onnx.functions.nbits import ACCURACY

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
        proto = super().build()
        foreign = [i for i, opset in enumerate(proto.opset_import) if opset.domain == DOMAIN]
        for i in reversed(foreign):  # a runtime without our library need not have heard of it
            del proto.opset_import[i]
        return proto

    def _projections(self, block: Any, h: str, y: str, name: str) -> tuple[str, tuple[str, str, str]]:
        attention = block.self_attn
        layers = {part: getattr(attention, part) for part in ("q_proj", "k_proj", "v_proj")}
        h, x = self._skip_norm(block.input_layernorm, h, y, f"{name}.input_layernorm")
        if getattr(attention, "q_norm", None) is None:
            return h, (self._linears(list(layers.values()), x, f"{name}.self_attn.qkv"), "", "")
        q, k, v = (self._linear(layer, x, f"{name}.self_attn.{part}") for part, layer in layers.items())
        return h, (q, k, v)

    def _attend(self, q: str, k: str, v: str, number: int, **attributes: Any) -> str:
        past, present = f"past_key_values.{number}", f"present.{number}"
        return self.g.add_many(
            "GroupQueryAttention",
            [q, k, v, f"{past}.key", f"{past}.value", "last_positions", "total_tokens", "cos", "sin"],
            [f"model.layers.{number}.self_attn.heads", f"{present}.key", f"{present}.value"],
            domain=MICROSOFT,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=self._window(number),
            **attributes,
        )[0]

    def _mlp(self, block: Any, h: str, y: str, name: str) -> tuple[str, str]:
        g, mlp = self.g, block.mlp
        h, x = self._skip_norm(block.post_attention_layernorm, h, y, f"{name}.post_attention_layernorm")
        name = f"{name}.mlp"
        gate, up = (self._linear(getattr(mlp, part), x, f"{name}.{part}") for part in ("gate_proj", "up_proj"))
        opened = g.add("Mul", [gate, g.add("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.act_fn")
        return h, self._linear(mlp.down_proj, g.add("Mul", [opened, up], f"{name}.gated"), f"{name}.down_proj")

    def _linear(self, layer: PackedLinear, x: str, name: str) -> str:
        return self._linears([layer], x, name)

    def _linears(self, layers: Sequence[PackedLinear], x: str, name: str) -> str:
        """Linears of one input as one product, their outputs beside each other, and their biases if there are any."""
        K, N, g = layers[0].in_features, sum(layer.out_features for layer in layers), self._block
        groups = -(-K // g)
        codes = np.frombuffer(self._rng.bytes(N * groups * g // 2), np.uint8).reshape(N, groups, g // 2)
        scales = (0.5 + self._rng.random((N, groups), np.float32)) * np.float32(K**-0.5 / _CODE_SIZE)
        self.stored_bits += 8 * (codes.nbytes + scales.nbytes)
        # flat scales are what every version of the runtime takes
        tensors = [self.g.stored(f"{name}.codes", codes), self.g.stored(f"{name}.scales", scales.reshape(-1))]
        y = self._product([x, *tensors], name, K=K, N=N, bits=4, block_size=g)
        if all(layer.bias is None for layer in layers):
            return y
        biases = [np.zeros(m.out_features) if m.bias is None else m.bias.float().numpy() for m in layers]
        bias = self.g.stored(f"{name}.bias", np.concatenate(biases).astype(np.float32))
        return self.g.add("Add", [y, bias], f"{name}.biased")

    def _rounded_product(self, x: str, table: QuantizedTable, name: str) -> None:
        inputs = [x, self.g.stored(f"{name}.blocks", table.blocked()), *self._scales(table, name)]
        self._product(inputs, "logits", **table_attributes(table))

    def _product(self, inputs: list[str], y: str, **attributes: int) -> str:
        return self.g.add("MatMulNBits", inputs, y, domain=MICROSOFT, accuracy_level=ACCURACY, **attributes)


def require_block(block: int) -> None:
    """Refuse a block length that MatMulNBits does not take."""
    if block not in BLOCKS:
        raise LitBinqError(f"block: got {block}, expected one of {', '.join(map(str, BLOCKS))}")
