"""`litbinq bench shape`: decoding at the shapes of a model that nobody need have, one bit beside ONNX Runtime's four.

Both candidates are written with random weights (`lit_binq_onnx.bench.shapes`, `lit_binq_onnx.bench.four_bit`), each as
a folder that `OnnxModel` opens, and run as `bench decode` runs exports: a process each, taking turns. A prompt of
random tokens fills their caches first. The four-bit process does not load our library.

Legend: n tokens in the cache when a burst begins, V vocabulary, K width.
"""

import contextlib
import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats.registry import packed_linears
from lit_binq.utils.files import new_folder, write_json
from lit_binq_onnx.bench.four_bit import FourBitBuilder, require_block
from lit_binq_onnx.bench.generation import Entry, Record, require_numbers, time_entries
from lit_binq_onnx.bench.shapes import Shape, random_model, random_tables, save_config, weights_of
from lit_binq_onnx.build.fused import build_fused
from lit_binq_onnx.build.head import Tables
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.functions import DOMAIN, OPSET
from lit_binq_onnx.runtime.library import HOW_TO_BUILD, library_path
from lit_binq_onnx.runtime.session import DATA, FACTS, FACTS_VERSION, FUSED, MODEL

log = logging.getLogger(__name__)

FOLDERS = ("one-bit", "four-bit")
"""Of our candidate and of the baseline."""

_ROOM = 64 << 20  # for graphs, tables of angles and norms


@dataclass
class ShapeRecord(Record):
    """One candidate; `--json` writes a list of these.

    Attributes:
        shape: the model's name, and how many blocks of it there are where they are not all.
        format: of our weights; the baseline's is "4 bits" with its block.
        blocks: decoder blocks that were built and timed.
        full_blocks: as many as the shape has.
        head_bits: of the head; 0: float32, stored as float16.
        true_bits: bits of the linears' stored tensors over their weights.
        weight_bytes: linears and head, which every token reads once.
        cache_bytes: keys and values that a token reads, in the middle of a burst; float32.
        share_of_read: gbytes_per_s, which counts both, over read_gbytes_per_s: 1 is the limit of this machine's memory.
    """

    shape: str = ""
    format: str = ""
    blocks: int = 0
    full_blocks: int = 0
    head_bits: int = 0
    true_bits: float = 0.0
    weight_bytes: int = 0
    cache_bytes: int = 0
    share_of_read: float | None = None


@dataclass(frozen=True)
class Options:
    """What is built and timed.

    Attributes:
        format: a key of `lit_binq_onnx.bench.shapes.LAYOUTS`.
        head_bits: 0, 4 or 8, of both; a 4-bit head of the baseline is in blocks of `block` and symmetric.
        block: weights of the baseline that share a scale.
        past: n.
        tokens: tokens of a timed burst.
        rounds: bursts of each.
        threads: of each.
    """

    format: str = "row_column"
    head_bits: int = 4
    block: int = 32
    past: int = 128
    tokens: int = 16
    rounds: int = 7
    threads: int = 1


@dataclass(frozen=True)
class Written:
    """A candidate's folder.

    Attributes:
        folder: where.
        true_bits: of its linears, for each weight.
        weight_bytes: what a token reads of its weights.
    """

    folder: Path
    true_bits: float
    weight_bytes: int


def _head_bytes(model: PreTrainedModel, tables: Tables | None) -> int:
    """What a product with the head reads; a dense one is float32 in memory, whatever the file holds."""
    if tables is not None:
        return tables.head.nbytes
    return int(model.config.vocab_size * model.config.hidden_size * 4)


def _facts(model: PreTrainedModel, graph: onnx.ModelProto, written: Written, options: Options) -> dict[str, Any]:
    """What `OnnxModel` wants to know of a folder; see `session.read_facts`."""
    return {
        "version": FACTS_VERSION,
        "architecture": type(model).__name__,
        "true_bits": written.true_bits,
        "head_bits": options.head_bits,
        "fused": True,
        "packed_nodes": len(packed_linears(model)) if any(n.domain == DOMAIN for n in graph.graph.node) else 0,
        "nodes": len(graph.graph.node),
        "opset": OPSET,
        "data_bytes": (written.folder / DATA).stat().st_size,
        "token_bytes": written.weight_bytes,
        "max_positions": model.config.max_position_embeddings,
        "packed": None,
        "versions": {"onnx": onnx.__version__},
    }


def _finish(model: PreTrainedModel, graph: onnx.ModelProto, written: Written, options: Options) -> Written:
    """Write what stands beside the data file."""
    onnx.save(graph, written.folder / FUSED)
    # There is no other route, but a folder without the file is none of ours.
    shutil.copyfile(written.folder / FUSED, written.folder / MODEL)
    save_config(model.config, written.folder)
    write_json(written.folder / FACTS, _facts(model, graph, written, options))
    return written


def write_models(shape: Shape, folder: Path, options: Options) -> list[Written]:
    """Write both candidates.

    The one-bit weights are in memory while it works, of the baseline's one linear at a time.

    Args:
        shape: of the model.
        folder: where; gets `FOLDERS`.
        options: what to build.

    Returns:
        Ours and the baseline, in this order.

    Raises:
        LitBinqError: a shape or format that has no fused graph, or not enough room.
    """
    model = random_model(shape, options.format, dense_tables=options.head_bits == 0)
    weights, bits = weights_of(model)
    tables = random_tables(model.config, options.head_bits)
    baseline_tables = random_tables(model.config, options.head_bits, block=options.block, symmetric=True)
    _require_room(folder, _both_bytes(model, options, tables, weights, bits))
    ours, baseline = (folder / name for name in FOLDERS)
    try:
        ours.mkdir()
        with DataFile(ours / DATA) as data:
            graph = build_fused(model, tables, data)
        written = Written(ours, bits / weights, bits // 8 + _head_bytes(model, tables))
        found = [_finish(model, graph, written, options)]
        baseline.mkdir()
        with DataFile(baseline / DATA) as data:
            builder = FourBitBuilder(model, baseline_tables, data, block=options.block)
            graph = builder.build()
        bits = builder.stored_bits
        written = Written(baseline, bits / weights, bits // 8 + _head_bytes(model, baseline_tables))
        found.append(_finish(model, graph, written, options))
    except OSError as error:
        raise LitBinqError(
            f"folder {str(folder.parent)!r}: the models cannot be written ({error.strerror}), expected a writable "
            "place with room for them: choose another one with `--folder`"
        ) from error
    return found


def _both_bytes(model: PreTrainedModel, options: Options, tables: Tables | None, weights: int, bits: int) -> int:
    """About how many bytes both folders will take."""
    config = model.config
    angles = config.max_position_embeddings * model.model.layers[0].self_attn.head_dim * 4
    if tables is None:
        rest = config.vocab_size * config.hidden_size * (2 if config.tie_word_embeddings else 4)
    else:
        rest = sum(table.nbytes for table in tables.distinct())
    return int(bits // 8 + weights * (4 + 32 / options.block) / 8 + 2 * (rest + angles) + _ROOM)


def _require_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise LitBinqError(
            f"folder {str(folder.parent)!r}: {free / 1e9:.1f} GB are free, expected {wanted / 1e9:.1f} for the models: "
            "choose another one with `--folder`, or fewer `--layers`"
        )


@contextlib.contextmanager
def _models(shape: Shape, options: Options, folder: str | None, keep: bool) -> Iterator[list[Written]]:
    """Both models while the body runs; kept ones stay once they are whole, others go in any case."""
    if keep:
        if folder is None:
            raise LitBinqError("keep: got no folder to keep the models in, expected `--folder FOLDER`")
        name = shape.name if shape.blocks == shape.full_blocks else f"{shape.name}-{shape.blocks}-blocks"
        target = Path(folder).expanduser() / name
        if target.exists() and not all((target / part / FACTS).is_file() for part in FOLDERS):
            raise LitBinqError(
                f"folder {folder!r}: {name!r} in it is not what this command wrote, expected it or nothing there: "
                "choose another `--folder`"
            )
        with new_folder(target) as work:
            written = write_models(shape, work, options)
        yield [dataclasses.replace(one, folder=target / one.folder.name) for one in written]
        return
    try:
        place = None if folder is None else Path(folder).expanduser()
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="litbinq-shape.", dir=place)
    except OSError as error:
        raise LitBinqError(
            f"folder {folder!r}: cannot be written ({error.strerror}), expected a folder in a writable place"
        ) from error
    with temporary as work_name:
        yield write_models(shape, Path(work_name), options)


def bench_shape(shape: Shape, options: Options, *, folder: str | None = None, keep: bool = False) -> list[ShapeRecord]:
    """Write both models, time them, and take them away again.

    Args:
        shape: of the model.
        options: what to build and how to time it.
        folder: where the models are written, in a folder of their own; None: the system's place for temporary files.
        keep: leave them there, as a folder of the shape's name.

    Returns:
        Ours and the baseline; a baseline that fails says so.

    Raises:
        LitBinqError: an option out of its range, our library is missing, no room, or our own graph fails.
    """
    numbers = {"past": options.past, "tokens": options.tokens, "rounds": options.rounds}
    require_numbers(threads=options.threads, **numbers)
    require_block(options.block)
    limit = getattr(shape.config, "max_position_embeddings", None)
    if limit is not None and options.past + options.tokens > limit:
        raise LitBinqError(
            f"past and tokens: got {options.past} + {options.tokens}, expected at most the {limit} positions of "
            f"{shape.name}"
        )
    if library_path() is None:
        raise LitBinqError(
            f"bench shape: our operator library is missing, expected it beside the package: {HOW_TO_BUILD}"
        )
    began = time.monotonic()
    with _models(shape, options, folder, keep) as written:
        log.info("bench shape: %s written in %.0f s", shape, time.monotonic() - began)
        return _measure(shape, options, written, kept=keep)


def _measure(shape: Shape, options: Options, written: list[Written], *, kept: bool) -> list[ShapeRecord]:
    """Time both and put together what is known of them."""
    config = shape.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = options.past + options.tokens // 2
    cache = 2 * shape.blocks * config.num_key_value_heads * head_dim * tokens * np.dtype(np.float32).itemsize
    names = ("lit-binq, 1 bit", f"ONNX Runtime, 4 bits, block {options.block}")
    kinds = (options.format, f"4 bits, block {options.block}")
    entries = [
        Entry(name, engine, str(one.folder), token_bytes=one.weight_bytes + cache)
        for name, engine, one in zip(names, ("native", "unmodified"), written, strict=True)
    ]
    ids = [int(i) for i in np.random.default_rng(0).integers(0, config.vocab_size, options.past)]
    records = time_entries(entries, "decode", ids, burst=options.tokens, rounds=options.rounds, threads=options.threads)
    found = []
    for record, one, kind in zip(records, written, kinds, strict=True):
        values = dataclasses.asdict(record) | ({} if kept else {"source": ""})
        rate, read = record.gbytes_per_s, record.read_gbytes_per_s
        found.append(
            ShapeRecord(
                **values,
                shape=str(shape),
                format=kind,
                blocks=shape.blocks,
                full_blocks=shape.full_blocks,
                head_bits=options.head_bits,
                true_bits=one.true_bits,
                weight_bytes=one.weight_bytes,
                cache_bytes=cache,
                share_of_read=rate / read if rate is not None and read else None,
            )
        )
    return found
