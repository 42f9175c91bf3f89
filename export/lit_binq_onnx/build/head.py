"""Embedding and head in 8 or 4 bits: ONNX Runtime's GatherBlockQuantized and our NBitsMatMul on packed tables.

At one bit a linear these two dominate: of SmolLM2's 134M weights 28M are a tied table, which a token reads whole as a
head, and one row of as an embedding. So a head of 4 bits goes with an embedding of 8: an embedding costs the time and
the memory of the rows that are read, and rounding them to 4 bits costs perplexity. At 8 bits a tied table stays one.

NBitsMatMul is lit_binq's own; its function body is one MatMulNBits of ONNX Runtime with the same tensors. Both
operators read the same bytes, the same scales and the same zero points, but declare the bytes in two shapes,
(V, K p) and (V, G, g p) with p = bits / 8, and ONNX Runtime takes neither for the other. So there are two initializers
of equal bytes; `lit_binq_onnx.build.tensors.DataFile` lets both point at one place of the data file.

How a table is rounded is in `lit_binq_onnx.build.head_rounding`. `dense` says what the operators multiply by, and
`rounded_tables` lets a torch model compute with the same values, so that a check needs no wider tolerance. The cost in
perplexity is measured by `lit_binq_onnx.runtime.perplexity` on both exports.

Legend: V vocabulary, K width, g block, G = K / g, s scales, z zero points, q codes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from torch import nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq_onnx.build.head_rounding import HEAD_BITS, QuantizedTable, quantize_table
from lit_binq_onnx.functions import DOMAIN, MICROSOFT, NBITS, VERSION
from lit_binq_onnx.runtime.session import MODEL

__all__ = ["HEAD_BITS", "MICROSOFT", "QuantizedTable", "Tables", "quantize_readers", "quantize_table", "rounded_tables"]

NEAR = 0.6
"""Largest error of a rounded row over its norm: 4 bits with error feedback come to 0.12 on average."""

_TABLE = re.compile(r"(embedding|head)\.int[48](\.|$)")


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
def rounded_tables(
    model: PreTrainedModel,
    bits: int,
    *,
    block: int | None = None,
    gram: torch.Tensor | None = None,
    stored: Path | None = None,
) -> Iterator[Tables | None]:
    """Let a torch model compute with its rounded embedding and head while the body runs.

    Args:
        model: float32 on the CPU; as it was once the body is left, however it is left.
        bits: of the head, 4 or 8; the embedding has 8. 0 changes nothing and gives None.
        block: g of the head; None lets `quantize_table` choose.
        gram: (K, K) of the head's inputs, for 4 bits; see `quantize_table`.
        stored: an exported folder whose tables are taken instead of rounding anew, after a look whether they are this
            model's.

    Raises:
        LitBinqError: the model has no embedding and head of the usual kind, the stored tables are not its own, or see
            `quantize_table`.
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
    first, last = embedding.weight, head.weight
    if stored is not None:
        tables = read_tables(stored, bits)
        require_near(tables.embedding, first, "embedding")
        require_near(tables.head, last, "head")
    else:
        table = quantize_table(first.detach().numpy(), 8, block=None if bits == 4 else block)
        same = last is first and bits == 8
        tables = Tables(table, table if same else quantize_table(last.detach().numpy(), bits, block=block, gram=gram))
    kept = [(weight, weight.data) for weight in (first, last)]
    try:
        if last is first and tables.head is not tables.embedding:
            head.weight = nn.Parameter(last.data, requires_grad=False)
        for weight, table in ((first, tables.embedding), (head.weight, tables.head)):
            weight.data = torch.from_numpy(table.dense())
        yield tables
    finally:
        head.weight = last
        for weight, data in kept:
            weight.data = data


def require_near(table: QuantizedTable, weight: torch.Tensor, what: str) -> None:
    """Refuse a stored table with a row that differs from the model's by as much as no rounding does."""
    shape = len(table.codes), table.width
    if shape == tuple(weight.shape):
        difference = (torch.from_numpy(table.dense()) - weight.data).norm(dim=1)
        if bool((difference <= NEAR * weight.data.norm(dim=1) + 1e-6).all()):
            return
    raise LitBinqError(
        f"head_bits: the stored {what} {shape} is not the packed model's {tuple(weight.shape)}, expected its rounding: "
        "export again, or correct `--packed`"
    )


def stored_values(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """What an initializer holds, from the data file where it is there."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.array(numpy_helper.to_array(tensor))
    at = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.fromfile(folder / at["location"], kind, int(np.prod(tensor.dims)), offset=int(at.get("offset", 0)))
    return values.reshape(tensor.dims)


def read_tables(folder: Path, bits: int) -> Tables:
    """The rounded tables that an exported folder holds, from its traced graph.

    Args:
        folder: what `export_onnx` wrote, with rounded tables.
        bits: of its head.

    Raises:
        LitBinqError: they are not there, or damaged.
    """
    try:
        graph = onnx.load(folder / MODEL, load_external_data=False).graph
        found = {tensor.name: tensor for tensor in graph.initializer if _TABLE.match(tensor.name)}
        arrays = {name: stored_values(tensor, folder) for name, tensor in found.items()}

        def table(name: str, bits: int) -> QuantizedTable:
            name = f"{name}.int{bits}"
            scales = arrays[f"{name}.scales"]
            codes = arrays[name if name in arrays else f"{name}.blocks"].reshape(len(scales), -1)
            block = codes.shape[1] * 8 // bits // scales.shape[1]
            return QuantizedTable(bits, block, codes, scales, arrays.get(f"{name}.zeros"))

        embedding = table("embedding", 8 if f"embedding.int{bits}" not in arrays else bits)
        untied = any(name.startswith("head.") for name in arrays)
        return Tables(embedding, table("head", bits) if untied else embedding)
    except Exception as error:  # protobuf and onnx raise kinds of their own
        raise LitBinqError(
            f"exported folder {str(folder)!r}: its rounded embedding and head cannot be read "
            f"({' '.join(str(error).split())[:200]}); export again"
        ) from error


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
        for transposed in (False, True):
            wanted = dense.T if transposed else dense
            if tuple(tensor.shape) == wanted.shape and np.array_equal(tensor.numpy(), wanted):
                found.append((value, transposed))
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
    }
    inputs = [node.inputs[0], blocked, scales, *zeros]
    made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    _replace(graph, node, ir.Node(DOMAIN, NBITS, inputs, made, num_outputs=1))
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
        name = ("embedding" if number == 0 else "head") + f".int{table.bits}"  # `read_tables` knows these names
        arrays = {name: table.codes, f"{name}.blocks": table.blocked(), f"{name}.scales": table.scales}
        if table.zeros is not None:
            arrays[f"{name}.zeros"] = table.zeros
        stored = [_initializer(graph, key, array) for key, array in arrays.items()]
        read = [
            (_multiply if transposed else _read_quantized)(graph, use.node, use.idx, table, stored)
            for value, transposed in found
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
    graph.opset_imports.setdefault(DOMAIN, VERSION)
