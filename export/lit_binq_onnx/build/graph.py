"""From the traced graph to the stored one: cheap clean-ups, proof that bits survived.

Knows ONNX and the packed layer's buffers; nothing of models, folders or sessions.

`torch.onnx` can clean up by itself (`optimize=True`), at more cost than the translation itself: its pattern
rewriter walks the whole graph once a rule (30 blocks: 38 s). Merging equal nodes first takes two thirds of
the graph away in a quarter of a second; folding and the small rewrites below then take under a second.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer

from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq_onnx.functions import DOMAIN, MICROSOFT, TABLE_BODIES

HALF_STORAGE_ELEMENTS = 1 << 14
"""Smaller float32 tensors are stored as they are: a node for each would cost more than it saves."""

_END = np.iinfo(np.int64).max
"""How torch writes "to the end" of an axis."""


def simplify(model: ir.Model) -> None:
    """Clean up a freshly translated graph, in place: the same values from a third of the nodes.

    The function bodies of our domain must not be in the model yet: inlining is not wanted.
    """
    _apply(
        model,
        passes.RemoveUnusedNodesPass(),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
    )
    # The defaults fold nothing above a few kilobytes: packed weights and embeddings stay as they are.
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    _apply(
        model,
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
    )
    drop_full_slices(model.graph)
    divide_by_roots(model.graph)
    widen_bfloat16(model.graph)
    _apply(
        model,
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    )


def _apply(model: ir.Model, *steps: ir.passes.PassBase) -> None:
    for step in steps:
        step(model)


def name_lengths(graph: ir.Graph, names: dict[str, str]) -> None:
    """Rename symbolic lengths in every shape of a graph, also within expressions such as "s1 + s2".

    Args:
        graph: changed in place.
        names: {torch's symbol: its new name}.
    """
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = {*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)}
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            symbols.sub(lambda found: names[found[0]], dim.value)
            if isinstance(dim, ir.SymbolicDim) and isinstance(dim.value, str)
            else dim
            for dim in value.shape
        )


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def drop_full_slices(graph: ir.Graph) -> int:
    """Remove slices that take everything (0 to the end, step 1). Returns how many there were."""
    dropped = 0
    for node in list(graph):
        if node.op_type != "Slice" or node.domain not in ("", "ai.onnx"):
            continue
        source, result = node.inputs[0], node.outputs[0]
        starts, ends = _constant(node.inputs[1]), _constant(node.inputs[2])
        has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
        steps = _constant(node.inputs[4]) if has_steps else np.ones(1)
        if source is None or starts is None or ends is None or steps is None or result.is_graph_output():
            continue
        if (starts == 0).all() and (ends == _END).all() and (steps == 1).all():
            result.replace_all_uses_with(source)
            graph.remove(node, safe=True)
            dropped += 1
    return dropped


def divide_by_roots(graph: ir.Graph) -> int:
    """Write x * (1 / sqrt(v)) as x / sqrt(v), the form in which ONNX Runtime knows an RMS norm and fuses it.

    Returns how many products were rewritten. Values change by a rounding.
    """
    rewritten = 0
    for reciprocal in list(graph):
        if reciprocal.op_type != "Reciprocal":
            continue
        root = reciprocal.inputs[0]
        uses = list(reciprocal.outputs[0].uses())
        if root is None or len(uses) != 1 or (made := root.producer()) is None or made.op_type != "Sqrt":
            continue
        product = uses[0].node
        if product.op_type != "Mul" or product.outputs[0].is_graph_output():
            continue
        other = product.inputs[1 - uses[0].idx]
        quotient = ir.Node("", "Div", [other, root], num_outputs=1)
        result, old = quotient.outputs[0], product.outputs[0]
        result.type, result.shape = old.type, old.shape
        graph.insert_before(product, quotient)
        old.replace_all_uses_with(result)
        graph.remove([product, reciprocal], safe=True)
        rewritten += 1
    return rewritten


def widen_bfloat16(graph: ir.Graph) -> int:
    """Compute products and sums of bfloat16 (Falcon's ALiBi) in float32 and round: ONNX Runtime has no other on a CPU.

    torch does the same, so no value changes. Returns how many nodes were rewritten.
    """
    short, full = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    rewritten = 0
    for node in list(graph):
        if node.op_type not in ("Add", "Sub", "Mul", "Div") or node.domain != "" or node.outputs[0].dtype != short:
            continue
        wide = [ir.Node("", "Cast", [x], {"to": ir.AttrInt64("to", full)}, num_outputs=1) for x in node.inputs]
        made = ir.Node("", node.op_type, [cast.outputs[0] for cast in wide], num_outputs=1)
        back = ir.Node("", "Cast", made.outputs, {"to": ir.AttrInt64("to", short)}, num_outputs=1)
        for cast, source in zip(wide, node.inputs, strict=True):
            cast.outputs[0].type = ir.TensorType(full)
            cast.outputs[0].shape = None if source is None else source.shape
        made.outputs[0].type = ir.TensorType(full)
        made.outputs[0].shape, result = node.outputs[0].shape, node.outputs[0]
        back.outputs[0].type, back.outputs[0].shape = result.type, result.shape
        graph.insert_before(node, [*wide, made, back])
        result.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        rewritten += 1
    return rewritten


def store_half(graph: ir.Graph) -> int:
    """Store large float32 tensors that float16 holds exactly as float16, with a Cast that runs at load.

    The rest of a packed model (embeddings, head, positions) is rounded to float16 when it is packed, so this
    halves most of the data file and changes no value. What our operators and rounded tables read stays float32.

    Returns:
        Number of tensors now stored in half the bytes.
    """
    stored = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < HALF_STORAGE_ELEMENTS:
            continue
        if any(use.node.domain in (DOMAIN, MICROSOFT) for use in value.uses()) or value.is_graph_output():
            continue
        full = tensor.numpy()
        with np.errstate(over="ignore"):  # values that float16 cannot hold become inf and are refused below
            half = full.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), full):
            continue
        compact = ir.Value(
            name=f"{name}.float16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.float16"),
        )
        cast = ir.Node("", "Cast", [compact], {"to": ir.AttrInt64("to", ir.DataType.FLOAT)}, num_outputs=1)
        cast.outputs[0].name = f"{name}.float32"
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(compact)
        stored += 1
    return stored


def _digest(kind: str, arrays: Iterable[np.ndarray]) -> str:
    """One name for an operator and its tensors: dtype, shape and bytes of each."""
    h = hashlib.sha256(kind.encode())
    for a in arrays:
        h.update(f"{a.dtype}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def require_packed_nodes(model: ir.Model, layers: dict[str, PackedLinear]) -> None:
    """Make sure that every operator call of a packed layer became one node that reads exactly the layer's tensors.

    Args:
        model: the exported model; initializers may lie in an external file.
        layers: the packed layers of the torch model, by name.

    Raises:
        LitBinqError: a call has no node, a node has no layer, or a tensor was changed on the way.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type not in TABLE_BODIES]
    wanted = [
        (name, _digest(kind, (t.detach().cpu().numpy() for t in stored)))
        for name, layer in layers.items()
        for kind, stored in layer.operands()
    ]
    if len(nodes) != len(wanted):
        raise LitBinqError(
            f"export: {len(layers)} packed linears with {len(wanted)} operators became {len(nodes)} nodes, expected "
            "one each: this model calls a linear not once but never or several times in a pass, and is not supported"
        )
    found: Counter[str] = Counter()
    for node in nodes:
        arrays = [_constant(value) for value in node.inputs[1:]]
        if any(a is None for a in arrays):
            raise LitBinqError(
                f"export: node {node.name} reads weights that are no longer stored tensors; expected packed "
                "initializers: the export and this version of torch or onnxscript do not fit"
            )
        found[_digest(node.op_type, (a for a in arrays if a is not None))] += 1
    lost = Counter(digest for _, digest in wanted) - found
    if lost:
        name = next(n for n, d in wanted if d in lost)
        raise LitBinqError(
            f"export: the packed tensors of {name} were changed on the way to ONNX ({lost.total()} operators of "
            f"{len(wanted)}); expected the same bytes: the export and this version of torch or onnxscript do "
            "not fit"
        )
