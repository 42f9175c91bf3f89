"""Embedding and head in 8 or 4 bits: ONNX Runtime's GatherBlockQuantized and MatMulNBits on one packed table.

At one bit a linear these two dominate: of SmolLM2's 134M weights 28M are a tied table, which a token reads whole.

Both operators read the same bytes, the same scales and the same zero points, but declare the bytes in two shapes,
(V, K p) and (V, G, g p) with p = bits / 8, and ONNX Runtime takes neither for the other. So there are two initializers
of equal bytes; `lit_binq_onnx.tensors.DataFile` lets both point at one place of the data file.

The rounding (ours, weight-only, round-to-nearest) is done for each block of g neighbours in a row:

    8 bits   symmetric: w^ = s (q - 128), s = max |w| / 127
    4 bits   asymmetric: w^ = s (q - z), from the range of the block shrunk by the factor that errs least (squared)

`dense` says what the operators multiply by, and `rounded_tables` lets a torch model compute with the same values, so
that a check needs no wider tolerance. The cost in perplexity is measured by `lit_binq_onnx.perplexity` on both exports.

Legend: V vocabulary, K width, g block, G = K / g, W (V, K) table, s scales, z zero points, q codes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError

log = logging.getLogger(__name__)

MICROSOFT = "com.microsoft"
HEAD_BITS = (0, 4, 8)
BLOCKS = (32, 16)
"""Block lengths in the order of choice: a block must divide the width, since the embedding has no padded columns."""

ACCURACY = 4
"""accuracy_level of MatMulNBits: 4 rounds activations to int8, 1 keeps float32 (for exact comparisons; slow)."""

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Factors tried on the range of a 4-bit block."""

_ROWS = 4096  # rows rounded at a time: bounds the float32 copies to a few times 4096 K


@dataclass(frozen=True)
class QuantizedTable:
    """A rounded table.

    Attributes:
        bits: 4 or 8.
        block: g.
        codes: (V, K bits / 8) uint8; of two 4-bit codes the first is in the low half.
        scales: (V, G) float32.
        zeros: (V, ceil(G / 2)) uint8, two to a byte; None means 2^(bits - 1) everywhere.
    """

    bits: int
    block: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @property
    def width(self) -> int:
        """K."""
        return self.codes.shape[1] * 8 // self.bits

    def blocked(self) -> np.ndarray:
        """The codes as MatMulNBits wants them, (V, G, g bits / 8) uint8."""
        return self.codes.reshape(len(self.codes), -1, self.block * self.bits // 8)

    def stored_bits(self) -> float:
        """Bits of everything stored, for each weight."""
        size = self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)
        return 8 * size / (len(self.codes) * self.width)

    def dense(self) -> np.ndarray:
        """The table it stands for, (V, K) float32."""
        rows, groups = self.scales.shape
        q = _unpack(self.codes) if self.bits == 4 else self.codes
        z = np.full((rows, groups), 128, np.uint8) if self.zeros is None else _unpack(self.zeros)[:, :groups]
        out = np.empty((rows, self.width), np.float32)
        for i in range(0, rows, _ROWS):
            part = slice(i, i + _ROWS)
            levels = q[part].reshape(-1, groups, self.block).astype(np.float32) - z[part, :, None]
            out[part] = (levels * self.scales[part, :, None]).reshape(len(levels), -1)
        return out


def _pack(values: np.ndarray) -> np.ndarray:
    """4-bit values (V, n) in bytes (V, ceil(n / 2)), the first of two in the low half."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed: np.ndarray = values[:, 0::2] | (values[:, 1::2] << 4)
    return packed


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Bytes (V, n) as 4-bit values (V, 2 n)."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _round_symmetric(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 bits. blocks (m, G, g) float32 -> codes (m, G, g) uint8, scales (m, G) float32."""
    scales = np.abs(blocks).max(2) / 127
    scales[scales == 0] = 1
    codes = np.rint(blocks / scales[:, :, None]) + 128
    return codes.astype(np.uint8), scales.astype(np.float32)


def _round_asymmetric(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4 bits. blocks (m, G, g) float32 -> codes (m, G, g) uint8, scales (m, G) float32, zeros (m, G) uint8."""
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)  # zero stays a level
    best = np.full(low.shape, np.inf, np.float32)
    codes = np.zeros(blocks.shape, np.uint8)
    scales, zeros = np.ones(low.shape, np.float32), np.zeros(low.shape, np.uint8)
    for shrink in SHRINK:
        s = ((high - low) * (shrink / 15)).astype(np.float32)
        s[s == 0] = 1
        z = np.clip(np.rint(-low * shrink / s), 0, 15)
        q = np.clip(np.rint(blocks / s[:, :, None]) + z[:, :, None], 0, 15)
        error = np.square((q - z[:, :, None]) * s[:, :, None] - blocks).sum(2)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], s[better], z[better].astype(np.uint8)
        codes[better] = q[better].astype(np.uint8)
    return codes, scales, zeros


def quantize_table(table: np.ndarray, bits: int) -> QuantizedTable:
    """Round a table.

    Args:
        table: (V, K) float32.
        bits: 4 or 8.

    Raises:
        LitBinqError: another number of bits, a width that no block divides, or values that are not finite.
    """
    if bits not in HEAD_BITS[1:]:
        raise LitBinqError(f"head_bits: got {bits}, expected one of {', '.join(map(str, HEAD_BITS))}")
    rows, width = table.shape
    block = next((g for g in BLOCKS if width % g == 0), None)
    if block is None:
        raise LitBinqError(f"head_bits: the embedding is {width} wide, expected a multiple of 16: use `--head_bits 0`")
    if not np.isfinite(table).all():
        raise LitBinqError("head_bits: the embedding holds values that are not finite, expected finite ones")
    codes = np.empty((rows, width // block, block), np.uint8)
    scales = np.empty((rows, width // block), np.float32)
    zeros = None if bits == 8 else np.empty((rows, width // block), np.uint8)
    for i in range(0, rows, _ROWS):
        part = slice(i, i + _ROWS)
        blocks = table[part].reshape(-1, width // block, block)
        if zeros is None:
            codes[part], scales[part] = _round_symmetric(blocks)
        else:
            codes[part], scales[part], zeros[part] = _round_asymmetric(blocks)
    flat = codes.reshape(rows, width)
    if zeros is None:
        return QuantizedTable(bits, block, flat, scales, None)
    return QuantizedTable(bits, block, _pack(flat), scales, _pack(zeros))


@dataclass(frozen=True)
class Tables:
    """The rounded embedding and head of a model; one object where they are tied.

    Attributes:
        embedding: read by token number.
        head: multiplied by.
    """

    embedding: QuantizedTable
    head: QuantizedTable

    def distinct(self) -> list[QuantizedTable]:
        """Each table once."""
        return [self.embedding] if self.head is self.embedding else [self.embedding, self.head]


@contextmanager
def rounded_tables(model: PreTrainedModel, bits: int) -> Iterator[Tables | None]:
    """Let a torch model compute with its rounded embedding and head while the body runs.

    Args:
        model: float32 on the CPU; as it was once the body is left, however it is left.
        bits: 4 or 8; 0 changes nothing and gives None.

    Raises:
        LitBinqError: the model has no embedding and head of the usual kind, or see `quantize_table`.
    """
    if bits == 0:
        yield None
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise LitBinqError(
            f"head_bits: {type(model).__name__} has embedding {type(embedding).__name__} and head "
            f"{type(head).__name__}, expected nn.Embedding and nn.Linear: use `--head_bits 0`"
        )
    weights = [embedding.weight] if embedding.weight is head.weight else [embedding.weight, head.weight]
    kept = [weight.data for weight in weights]
    tables = [quantize_table(weight.numpy(), bits) for weight in kept]
    try:
        for weight, table in zip(weights, tables, strict=True):
            weight.data = torch.from_numpy(table.dense())
        yield Tables(tables[0], tables[-1])
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new stored tensor."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put a node with one output in the place of another."""
    result, before = new.outputs[0], old.outputs[0]
    result.type, result.shape = before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    result.name = before.name  # an output keeps its name


def _find(graph: ir.Graph, dense: np.ndarray) -> list[tuple[ir.Value, bool]]:
    """Initializers that hold a table, and whether they hold it transposed (a folded Transpose)."""
    found = []
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        for turned in (False, True):
            wanted = dense.T if turned else dense
            if tuple(tensor.shape) == wanted.shape and np.array_equal(tensor.numpy(), wanted):
                found.append((value, turned))
                break
    return found


def _multiply(graph: ir.Graph, node: ir.Node, at: int, table: QuantizedTable, stored: list[ir.Value]) -> bool:
    """Rewrite a product with the transposed table; false where it is of another kind."""
    if node.op_type != "MatMul" or at != 1:
        return False
    _, blocked, scales, *zeros = stored
    attributes = {
        "K": table.width,
        "N": len(table.codes),
        "bits": table.bits,
        "block_size": table.block,
        "accuracy_level": ACCURACY,
    }
    inputs = [node.inputs[0], blocked, scales, *zeros]
    made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    _replace(graph, node, ir.Node(MICROSOFT, "MatMulNBits", inputs, made, num_outputs=1))
    return True


def _read_quantized(graph: ir.Graph, node: ir.Node, at: int, table: QuantizedTable, stored: list[ir.Value]) -> bool:
    """Rewrite one reader of a dense table; false where it is of no known kind."""
    flat, _, scales, *zeros = stored
    bits = ir.AttrInt64("bits", table.bits)
    block = ir.AttrInt64("block_size", table.block)
    if node.op_type == "Gather" and at == 0 and node.attributes.get_int("axis", 0) == 0:
        new = ir.Node(
            MICROSOFT,
            "GatherBlockQuantized",
            [flat, node.inputs[1], scales, *zeros],
            [bits, block, ir.AttrInt64("gather_axis", 0), ir.AttrInt64("quantize_axis", 1)],
            num_outputs=1,
        )
        _replace(graph, node, new)
        return True
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return False
    if not all(_multiply(graph, use.node, use.idx, table, stored) for use in list(node.outputs[0].uses())):
        return False
    graph.remove(node, safe=True)
    return True


def quantize_readers(model: ir.Model, tables: Tables) -> None:
    """Let a traced graph read rounded tables packed: Gather and MatMul become their quantized kin, in place.

    Args:
        model: traced from a torch model within `rounded_tables`.
        tables: what that gave.

    Raises:
        LitBinqError: a table is not in the graph, or read in another way.
    """
    graph = model.graph
    for number, table in enumerate(tables.distinct()):
        dense = table.dense()
        found = _find(graph, dense)
        name = ("embedding" if number == 0 else "head") + f".int{table.bits}"
        arrays = {name: table.codes, f"{name}.blocks": table.blocked(), f"{name}.scales": table.scales}
        if table.zeros is not None:
            arrays[f"{name}.zeros"] = table.zeros
        stored = [_initializer(graph, key, array) for key, array in arrays.items()]
        read = [
            (_multiply if turned else _read_quantized)(graph, use.node, use.idx, table, stored)
            for value, turned in found
            for use in list(value.uses())
        ]
        if not read or not all(read):
            raise LitBinqError(
                f"head_bits: the {name.partition('.')[0]} of this model is read in another way than by number and by "
                "a product; expected these: use `--head_bits 0`"
            )
        for value, _ in found:
            del graph.initializers[str(value.name)]
        for value in stored:
            if not value.uses():  # a table of its own is read in one of the two shapes only
                del graph.initializers[str(value.name)]
    graph.opset_imports.setdefault(MICROSOFT, 1)
