"""Does an exported folder hold the packed folder's own tensors? Read from both files, through no model.

A model that was loaded wrongly is exported consistently wrongly, and every comparison with that model passes. So what
lies in the packed folder's model.safetensors is looked for in the graphs:

    packed linears    every operator node reads exactly the stored bytes, and there is no other such node
    everything else   each tensor is an initializer: its values in float32 or float16, as they are or transposed, or
                      rounded where the export rounded embedding and head, with the rounding done again

Tensors small enough for the exporter to compute with them ahead (norms of which one is added, say) may be found so
changed; modules that no pass calls need not be there.

Knows safetensors and ONNX files; of the torch model only which modules a pass calls.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError, first_line
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import empty_layer
from lit_binq.hub.save_load import WEIGHTS
from lit_binq_onnx.build.graph import require_packed_nodes
from lit_binq_onnx.build.head import read_tables, require_near
from lit_binq_onnx.build.head_rounding import QuantizedTable, quantize_table
from lit_binq_onnx.runtime.session import FUSED, MODEL, read_facts

FOLDED = 8192
"""Tensors of no more elements may be changed by what the exporter computes ahead."""

SAMPLE = 256
"""Rows of a table with error feedback whose rounding is done again."""


def require_same_tensors(
    folder: Path, packed: str | Path, model: PreTrainedModel, *, gram: Tensor | None = None
) -> str:
    """Compare an exported folder with a packed folder; see this file's head.

    Args:
        folder: what `export_onnx` wrote.
        packed: what `save_packed` wrote.
        model: the torch model of the same configuration: names of its modules, and which of them a pass calls.
        gram: with which a head of 4 bits was rounded, where that is known; else its rows must be near.

    Returns:
        One line for the report.

    Raises:
        LitBinqError: a tensor is not the packed folder's (the message names it), or a file cannot be read.
    """
    packed = Path(packed)
    linears = read_manifest(packed)["linears"]
    try:
        with safe_open(packed / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            layers = {name: _read_layer(file, names, name, entry, model) for name, entry in linears.items()}
            graph = ir.load(folder / MODEL)
            require_packed_nodes(graph, layers)
            stored = [_digests(graph)]
            if (folder / FUSED).is_file():
                stored.append(_digests(ir.load(folder / FUSED)))
            _require_operands(layers, stored)
            inside = {f"{name}.{buffer}" for name, layer in layers.items() for buffer in layer.weight_buffers()}
            return _compare_rest(file, sorted(names - inside), folder, packed, model, stored, gram, len(linears))
    except SafetensorError as error:
        raise LitBinqError(f"packed folder {str(packed)!r}: {WEIGHTS} is damaged ({first_line(error)})") from error


def _read_layer(file: Any, names: set[str], name: str, entry: Any, model: PreTrainedModel) -> Any:
    """A packed linear with the stored tensors."""
    like = model.get_submodule(name)
    has_bias = f"{name}.bias" in names
    linear = nn.Linear(int(like.in_features), int(like.out_features), has_bias, device="meta", dtype=torch.float32)  # type: ignore[arg-type]
    layer = empty_layer(linear, entry)
    for buffer, tensor in layer.state_dict().items():  # what is stored; `refresh` derives the other buffers
        tensor.copy_(file.get_tensor(f"{name}.{buffer}"))
    layer.refresh()
    return layer


def _key(array: np.ndarray) -> bytes:
    """A name for an array's dtype and bytes, whatever its shape."""
    h = hashlib.sha256(str(array.dtype).encode())
    h.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return h.digest()


def _digests(graph: ir.Model) -> set[bytes]:
    """Keys of all initializers."""
    return {_key(v.const_value.numpy()) for v in graph.graph.initializers.values() if v.const_value is not None}


def _require_operands(layers: dict[str, Any], stored: list[set[bytes]]) -> None:
    """Every tensor that an operator reads is in every graph."""
    for name, layer in layers.items():
        for _, tensors in layer.operands():
            if any(_key(t.detach().numpy()) not in keys for t in tensors for keys in stored):
                raise _wrong(f"packed tensors of {name}")


def _wrong(what: str) -> LitBinqError:
    return LitBinqError(
        f"export: the {what} in the packed folder are not those in the graph, expected the same bytes: the file is "
        "damaged, or the folder was not read as it was written: export again"
    )


def _forms(array: np.ndarray) -> Iterator[np.ndarray]:
    """How an initializer may hold a tensor."""
    yield array
    if array.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        exact = np.array_equal(half.astype(np.float32), array)
        yield from (half,) if exact else ()
        if array.ndim == 2:
            yield array.T
            yield from (half.T,) if exact else ()
        if array.size <= FOLDED:  # norms that multiply by 1 + w
            yield array + np.float32(1)


def _compare_rest(
    file: Any,
    names: list[str],
    folder: Path,
    packed: Path,
    model: PreTrainedModel,
    stored: list[set[bytes]],
    gram: Tensor | None,
    linears: int,
) -> str:
    """Everything but packed weights; returns the report's line."""
    facts = read_facts(folder)
    rounded = _rounded_names(file, names, packed, model) if facts.get("head_bits") else {}
    if rounded:
        _compare_tables(file, rounded, folder, facts, gram)
    missing, changed, found = [], [], 0
    for name in names:
        if name in rounded.values():
            continue
        tensor = file.get_tensor(name)
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        if all(any(_key(form) in keys for form in _forms(array)) for keys in stored):
            found += 1
        elif array.size <= FOLDED:
            changed.append(name)
        else:
            missing.append(name)
    if missing:
        called = _called(model)
        for name in missing:
            if name.rpartition(".")[0] in called:
                raise _wrong(f"values of {name}")
    line = f"tensors: {linears} packed linears and {found} others are the packed folder's, byte for byte"
    line += "; embedding and head are its rounding" if rounded else ""
    line += f"; {len(changed)} small ones are computed with ahead ({changed[0]})" if changed else ""
    return line + (f"; {len(missing)} are never called ({missing[0]})" if missing else "")


@torch.no_grad()
def _called(model: PreTrainedModel) -> set[str]:
    """Names of the modules that one pass calls."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    return called


def _rounded_names(file: Any, names: list[str], packed: Path, model: PreTrainedModel) -> dict[str, str]:
    """Stored names of the tables that a rounded head replaces: {"embedding": ..., "head": ...}."""
    tied = read_manifest(packed)["tied"]
    modules = {id(module): name for name, module in model.named_modules()}
    found = {}
    for what, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        name = f"{modules[id(module)]}.weight"
        found[what] = tied.get(name, name)
        if found[what] not in names:
            raise LitBinqError(f"packed folder {str(packed)!r}: {WEIGHTS} lacks the {what} {found[what]}")
    return found


def _compare_tables(
    file: Any, rounded: dict[str, str], folder: Path, facts: dict[str, Any], gram: Tensor | None
) -> None:
    """Rounded embedding and head against the stored ones, rounded again."""
    bits, block = int(facts["head_bits"]), facts.get("head_block")
    tables = read_tables(folder, bits)
    embedding = file.get_tensor(rounded["embedding"]).float().numpy()
    _require_rounding(tables.embedding, embedding, None if bits == 4 else block, None, rounded["embedding"])
    if tables.head is not tables.embedding or rounded["head"] != rounded["embedding"]:
        head = file.get_tensor(rounded["head"]).float().numpy()
        _require_rounding(tables.head, head, block, gram, rounded["head"])


def _require_rounding(
    table: QuantizedTable, full: np.ndarray, block: int | None, gram: Tensor | None, name: str
) -> None:
    """Refuse a table that is not the rounding of `full` (V, K) float32."""
    if (len(table.codes), table.width) != full.shape:
        raise _wrong(f"values of {name}")
    if table.bits == 4:
        require_near(table, torch.from_numpy(full), name)
        if gram is None:
            return
    rows = slice(None) if table.bits == 8 else np.linspace(0, len(full) - 1, min(SAMPLE, len(full)), dtype=int)
    again = quantize_table(np.ascontiguousarray(full[rows]), table.bits, block=block, gram=gram)
    same = [(again.codes, table.codes), (again.scales, table.scales)]
    if table.zeros is not None and again.zeros is not None:
        same.append((again.zeros, table.zeros))
    if not all(np.array_equal(new, old[rows]) for new, old in same):
        raise _wrong(f"values of {name}, rounded again,")
