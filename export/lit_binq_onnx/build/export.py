"""From a packed model in torch to a folder that ONNX Runtime runs.

The folder holds

    model.onnx, model.onnx.data    the graph, and every stored tensor once
    model_fused.onnx               the fused graph over the same data file, where one fits (`lit_binq_onnx.build.fused`)
    genai_config.json, operator library    with `target="genai"`, for onnxruntime-genai
    lit_binq_onnx.json             what was exported, from where, with which versions (`session.read_facts`)
    config.json, generation_config.json, tokenizer files    as Hugging Face writes them

Inputs and outputs of the graph are described in `lit_binq_onnx.build.trace`.

Every product of a packed linear is one node of domain lit_binq, whose meaning in standard operators is in the file
too: a linear of most formats is one, of a format with two planes or two factors two.
Tied embeddings are stored once: the head reads the transposed table, and the runtime transposes it while
loading. Measured at 49152 x 576 against Gemm(transB) and against a second, transposed copy in the file: the
same speed, half the memory of the former and half the file of the latter.
"""

import importlib.metadata
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.data.text import TextSource, encode, make_windows, read_text
from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq.hub.bits import true_bits
from lit_binq.models.rotary import length_dependent, longest_text
from lit_binq.models.supported import unsupported_reason
from lit_binq.utils.files import new_folder
from lit_binq.utils.places import require_folder
from lit_binq_onnx.build.check import check_onnx, fused_failure
from lit_binq_onnx.build.check_reference import Reference, torch_reference
from lit_binq_onnx.build.fused import build_fused, unfusable_reason
from lit_binq_onnx.build.genai import require_uniform, write_genai
from lit_binq_onnx.build.graph import require_packed_nodes, simplify, store_half
from lit_binq_onnx.build.head import Tables, quantize_readers, rounded_tables
from lit_binq_onnx.build.head_rounding import HEAD_BITS, RANDOM_DAMPING, TEXT_WINDOWS, head_gram, random_windows
from lit_binq_onnx.build.same_tensors import require_same_tensors
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.build.trace import cache_shapes, quiet, trace
from lit_binq_onnx.functions import OPSET, add_functions
from lit_binq_onnx.runtime.session import DATA, FACTS, FACTS_VERSION, FUSED, MODEL

log = logging.getLogger(__name__)

_PACKAGES = ("lit-binq", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def _refuse(model: PreTrainedModel, target: Path) -> dict[str, PackedLinear]:
    """The packed layers by name; raises where the model or the target is not what export expects."""
    reason = unsupported_reason(model)
    if reason is not None:
        raise LitBinqError(f"export: {reason}; for export take another `model` for the fit")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise LitBinqError(
            "export: the model has no packed linear, expected one calibrated by `litbinq fit`: give its packed folder"
        )
    if kept := [name for name, m in layers.items() if not m.deployable]:
        raise LitBinqError(
            f"export: {kept[0]} holds a published baseline's dense weight, whose bits are counted and not stored, "
            "expected a format with an operator: fit with another `closed_form.solver`"
        )
    # A packed layer holds its scales as they are stored; its bias computes like everything else.
    packed = {f"{name}.{b}" for name, layer in layers.items() for b, _ in layer.named_buffers() if b != "bias"}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wrong_dtype = tensor.is_floating_point() and tensor.dtype != torch.float32
        if tensor.device.type != "cpu" or (wrong_dtype and name not in packed):
            raise LitBinqError(
                f"export: {name} is {tensor.dtype} on {tensor.device}, expected float32 on the CPU: "
                "load the model with lit_binq.hub.load_packed, or call .float().cpu() on it"
            )
    require_folder(target, "output", FACTS)
    return layers


def _versions() -> dict[str, str]:
    """Versions of what made the file; a package that runs from its sources has none."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _write_graph(graph: ir.Model, data: DataFile, folder: Path) -> None:
    """model.onnx, its tensors in the data file, function bodies included."""
    graph.producer_name = "lit_binq"
    data.take(graph.graph)
    ir.save(graph, folder / MODEL)
    proto = onnx.load(folder / MODEL, load_external_data=False)
    add_functions(proto)
    onnx.save(proto, folder / MODEL)


def _write_fused(model: PreTrainedModel, tables: Tables | None, data: DataFile, folder: Path) -> bool:
    """model_fused.onnx over the same data file; false, with a line that says why, where the route does not fit."""
    reason = unfusable_reason(model)
    if reason is None:
        try:
            onnx.save(build_fused(model, tables, data), folder / FUSED)
        except LitBinqError as error:
            reason = str(error)
    if reason is not None:
        log.info("export: no fused graph (%s): the traced one does everything", reason)
    return reason is None


def _drop_wrong_fused(folder: Path, reference: Reference) -> bool:
    """Whether the fused graph computes what torch computes; it is taken away where it does not."""
    failure = fused_failure(folder, reference)
    if failure is not None:
        log.warning("export: the fused graph is left out, it does not fit this model (%s)", failure)
        (folder / FUSED).unlink()
    return failure is None


def _gram(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None) -> torch.Tensor:
    """Gram matrix of the head's inputs on some thousand tokens of a text, or on random ones."""
    windows = random_windows(model)
    if text is None:
        return head_gram(model, windows, damping=RANDOM_DAMPING)
    ids = encode(tokenizer, read_text(TextSource(text)))
    return head_gram(model, make_windows(ids, windows.shape[1], TEXT_WINDOWS, take="random"))


def _save_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        # Not its own `save_pretrained`, which refuses settings that contradict each other: published models have such.
        text = model.generation_config.to_json_string(keys_to_pop=["compile_config"])
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(folder)


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    packed: str | Path | None = None,
    check: bool = True,
    head_bits: int = 0,
    head_block: int | None = None,
    head_text: str | None = None,
    fused: Literal["auto", "off"] = "auto",
    target: Literal["ort", "genai"] = "ort",
) -> dict[str, Any]:
    """Export a packed model to a folder for ONNX Runtime.

    Args:
        model: a causal language model with PackedLinear layers, float32 on the CPU; put into evaluation mode.
        tokenizer: saved beside it.
        out_dir: folder to write; an empty folder or an older export there is replaced once all is done.
        packed: the packed folder the model came from: the graphs must hold its tensors (`same_tensors`), and it is
            recorded, so that the export can be checked again later.
        check: compare with torch before the folder gets its name.
        head_bits: bits of the head, 4 or 8 (see `lit_binq_onnx.build.head`), the embedding then has 8; 0 leaves both as
            they are.
        head_block: weights of the head that share a scale, see `head_rounding.HEAD_BLOCKS`; None takes 32, or 16.
        head_text: a text file, on which a head of 4 bits is to err little; None takes random tokens.
        fused: "auto" writes a fused graph where one fits; its logits are compared with torch's once even without
            `check`, and it is left out if they differ. "off" writes none.
        target: "genai" makes the folder one that onnxruntime-genai runs too (see `lit_binq_onnx.build.genai`).

    Returns:
        The facts written to lit_binq_onnx.json.

    Raises:
        LitBinqError: not a packed model, a target that holds other files, a model torch cannot trace, packed
            tensors that did not survive, a wrong option, or a failed check. Nothing is left behind then.
    """
    if head_bits not in HEAD_BITS:
        raise LitBinqError(f"head_bits: got {head_bits}, expected one of {', '.join(map(str, HEAD_BITS))}")
    if head_text is not None and head_bits != 4:
        raise LitBinqError(f"head_text: got {head_text!r} with {head_bits} head_bits, expected 4: add `--head_bits 4`")
    if head_block is not None and not head_bits:
        raise LitBinqError(f"head_block: got {head_block} with 0 head_bits, expected 4 or 8: add `--head_bits 4`")
    if fused not in ("auto", "off"):
        raise LitBinqError(f"fused: got {fused!r}, expected 'auto' or 'off'")
    if target not in ("ort", "genai"):
        raise LitBinqError(f"target: got {target!r}, expected 'ort' or 'genai'")
    if target == "genai" and (angles := length_dependent(model.config)) is not None:
        raise LitBinqError(
            f"target: got 'genai' with a rotary embedding of type {angles[0]!r}, expected 'ort': onnxruntime-genai "
            f"does not read a text again that grows beyond {angles[1]} tokens"
        )
    place = Path(os.path.abspath(out_dir))
    layers = _refuse(model, place)
    model.eval()
    if target == "genai":
        require_uniform(cache_shapes(model))
    with new_folder(place, FACTS) as work:
        start = time.monotonic()
        reference = None
        gram = _gram(model, tokenizer, head_text) if head_bits == 4 else None
        with rounded_tables(model, head_bits, block=head_block, gram=gram) as tables:
            graph = trace(model)
            traced = time.monotonic()
            with quiet():
                simplify(graph)
            if tables is not None:
                quantize_readers(graph, tables)
            store_half(graph.graph)
            nodes = len(graph.graph)
            # an embedding of its own is read by the row
            unread = tables.embedding.nbytes if tables is not None and len(tables.distinct()) > 1 else 0
            with DataFile(work / DATA) as data:
                _write_graph(graph, data, work)
                has_fused = fused == "auto" and _write_fused(model, tables, data, work)
            del graph
            require_packed_nodes(ir.load(work / MODEL), layers)
            written = time.monotonic()
            if check or has_fused:
                reference = torch_reference(model, tokenizer, fused=has_fused)
        config, angles = model.config.get_text_config(decoder=True), length_dependent(model.config)
        facts = {
            "version": FACTS_VERSION,
            "architecture": type(model).__name__,
            "true_bits": true_bits(model),
            "head_bits": head_bits,
            "head_block": head_block,
            "head_text": None if head_text is None else Path(head_text).name,
            "fused": has_fused,
            "packed_nodes": sum(len(m.operands()) for m in layers.values()),
            "nodes": nodes,
            "opset": OPSET,
            "data_bytes": data.size,
            "token_bytes": data.size - unread,
            "max_positions": longest_text(config),
            "angles": None if angles is None else {"kind": angles[0], "limit": angles[1]},
            # relative, so that both folders can move together
            "packed": None if packed is None else os.path.relpath(packed, place),
            "versions": _versions(),
        }
        _save_companions(model, tokenizer, work)
        _write_facts(work, facts)
        if packed is not None:
            log.info("export: %s", require_same_tensors(work, packed, model, gram=gram))
        if has_fused and reference is not None and not _drop_wrong_fused(work, reference):
            facts["fused"] = False
            _write_facts(work, facts)
        if target == "genai":
            write_genai(work, model, tokenizer, cache_shapes(model), fused=bool(facts["fused"]))
        log.info(
            "export: %d nodes, %d of them packed, %s fused graph, %.1f MB; "
            "%.0f s to trace, %.1f s to clean up and write",
            nodes,
            facts["packed_nodes"],
            "with a" if facts["fused"] else "no",
            sum(f.stat().st_size for f in work.iterdir()) / 1e6,
            traced - start,
            written - traced,
        )
        if check:
            for line in str(check_onnx(work, model, tokenizer, reference=reference)).splitlines():
                log.info("%s", line)
    return facts


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
