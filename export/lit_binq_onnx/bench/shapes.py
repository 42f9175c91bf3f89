"""Packed models of a given shape with random weights: what speed depends on, without a checkpoint.

A decoding pass costs what the shapes cost, whatever the weights are. Codes are random bits, scales are such that every
linear keeps the size of what comes in: activations stay ordinary numbers through any number of blocks. Nothing dense is
ever made: the modules are built on torch's meta device, where a tensor has a shape and no memory, and the packed layers
take their place. A LLaMA of 7B weights takes 0.8 GB so, where float32 would take 27.

Legend: V vocabulary, K width of a layer's input, N of its output, g block.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from lit_binq.errors import LitBinqError, first_line
from lit_binq.formats import PackedLinear
from lit_binq.formats.registry import empty_layer, packed_linears
from lit_binq_onnx.build.fused import unfusable_reason
from lit_binq_onnx.build.head import Tables
from lit_binq_onnx.build.head_rounding import HEAD_BITS, QuantizedTable

_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


def _llama(hidden: int, inner: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> Any:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **others,
    }


BUILT_IN: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=2048, tie_word_embeddings=False),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, max_position_embeddings=131072, tie_word_embeddings=True,
                           rope_parameters=_LLAMA3_ROPE),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, tie_word_embeddings=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
}  # fmt: skip
"""Shapes by name: options of `LlamaConfig`."""

LAYOUTS: dict[str, dict[str, int]] = {"row_column": {}, "grouped": {"group": 128}}
"""One-bit formats, and what beside K and N fixes the shapes of their tensors."""

TABLE_BLOCKS = (128, 64, 32, 16)
"""Blocks of a head, from which the first that is not too large and divides the width is taken."""

_TABLE_SIZE = 0.02  # standard deviation of the tables' values, that of an untrained model
_ROWS = 4096  # rows of a dense table made at a time


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        name: for tables: a built-in one's, or the folder's.
        config: with as many blocks as are wanted.
        full_blocks: how many the shape has by itself.
    """

    name: str
    config: PreTrainedConfig
    full_blocks: int

    @property
    def blocks(self) -> int:
        """How many decoder blocks are built."""
        return int(self.config.num_hidden_layers)

    def __str__(self) -> str:
        return (
            self.name
            if self.blocks == self.full_blocks
            else f"{self.name}, {self.blocks} of its {self.full_blocks} blocks"
        )


def read_shape(source: str, blocks: int | None = None) -> Shape:
    """A shape by name or from a folder.

    Args:
        source: a key of `BUILT_IN`, or a folder with the config.json of a causal language model, or that file.
        blocks: decoder blocks, fewer than there are for a trial; None for all.

    Raises:
        LitBinqError: neither a name nor such a folder, or as many blocks as it does not have.
    """
    if source in BUILT_IN:
        name, config = source, LlamaConfig(**BUILT_IN[source])
    else:
        path = Path(source).expanduser()
        path = path.parent if path.name == "config.json" else path
        if not (path / "config.json").is_file():
            raise LitBinqError(
                f"model: got {source!r}, expected one of {', '.join(BUILT_IN)} or a folder with a config.json"
            )
        try:
            name, config = path.resolve().name, AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # what is wrong with a file is told in many ways
            raise LitBinqError(
                f"model: {source!r} cannot be read ({first_line(error)[:200]}), expected the config.json of a causal "
                "language model"
            ) from error
    full = getattr(config, "num_hidden_layers", None)
    if not isinstance(full, int) or full < 1:
        raise LitBinqError(f"model: {source!r} has {full!r} num_hidden_layers, expected a number from 1")
    config = copy.deepcopy(config)
    if blocks is not None:
        if not 1 <= blocks <= full:
            raise LitBinqError(f"layers: got {blocks}, expected 1 to the {full} of {name}")
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:blocks]
    return Shape(name, config, full)


def _random_bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """(shape) uint8; the array may be written to."""
    return np.frombuffer(bytearray(rng.bytes(int(np.prod(shape)))), np.uint8).reshape(shape)


def _spread(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    """Positive numbers around a size, from its half to its one and a half, float32."""
    return (size * (0.5 + rng.random(shape, np.float32))).astype(np.float32)


def _fill(layer: PackedLinear, rng: np.random.Generator) -> None:
    """Random codes; scales whose products are about 1 / sqrt(K)."""
    both = {"row_scale", "col_scale"} <= layer.weight_buffers().keys()
    for name, tensor in layer.weight_buffers().items():
        if tensor.dtype == torch.uint8:
            tensor.copy_(torch.from_numpy(_random_bytes(rng, *tensor.shape)))
        else:
            size = 1.0 if both and name == "col_scale" else layer.in_features**-0.5
            tensor.copy_(torch.from_numpy(_spread(rng, tuple(tensor.shape), size)))


def _random_weight(rng: np.random.Generator, rows: int, width: int) -> nn.Parameter:
    """A table (rows, width) float32 of values that float16 holds exactly, as a packed folder's are."""
    table = torch.empty(rows, width)
    for i in range(0, rows, _ROWS):
        part = rng.standard_normal((min(_ROWS, rows - i), width), np.float32) * _TABLE_SIZE
        table[i : i + _ROWS] = torch.from_numpy(part.astype(np.float16).astype(np.float32))
    return nn.Parameter(table, requires_grad=False)


def random_model(shape: Shape, kind: str = "row_column", *, dense_tables: bool, seed: int = 0) -> PreTrainedModel:
    """A packed model of a shape, in evaluation mode, that `build_fused` takes.

    Args:
        shape: of a LLaMA-like model.
        kind: a key of `LAYOUTS`.
        dense_tables: whether embedding and head are made; else they stay without memory, for a graph whose tables are
            `random_tables`.
        seed: of all random numbers.

    Returns:
        Norms of ones, biases of zeros, the packed layers' buffers random; every tensor that a graph reads is on the
        CPU.

    Raises:
        LitBinqError: an unknown format, or a model that has no fused graph.
    """
    if kind not in LAYOUTS:
        raise LitBinqError(f"format: got {kind!r}, expected one of {', '.join(LAYOUTS)}")
    rng = np.random.default_rng(seed)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32)
    except Exception as error:  # configurations contradict themselves in many ways
        raise LitBinqError(
            f"model: no model of shape {shape.name!r} ({first_line(error)[:200]}), expected a causal language model's"
        ) from error
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers." in name:
            layer = empty_layer(module, {"format": kind, **LAYOUTS[kind]})
            _fill(layer, rng)
            model.set_submodule(name, layer)
    reason = unfusable_reason(model)
    if reason is not None:
        raise LitBinqError(f"model: shape {shape.name!r} has no fused graph ({reason}), expected a LLaMA-like model")
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
            module.weight = nn.Parameter(torch.ones(len(module.weight)), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    if dense_tables:
        embedding, head = model.model.embed_tokens, model.lm_head
        tied = bool(model.config.tie_word_embeddings)
        embedding.weight = _random_weight(rng, *embedding.weight.shape)
        head.weight = embedding.weight if tied else _random_weight(rng, *head.weight.shape)
    made: PreTrainedModel = model.eval()
    return made


def _random_table(
    rng: np.random.Generator, rows: int, width: int, bits: int, *, largest: int, zeros: bool
) -> QuantizedTable:
    """A rounded table (rows, width) in blocks of `largest` or, where that does not divide the width, fewer."""
    block = next((g for g in TABLE_BLOCKS if g <= largest and width % g == 0), None)
    if block is None:
        raise LitBinqError(f"head_bits: the embedding is {width} wide, expected a multiple of 16: use `--head_bits 0`")
    codes = _random_bytes(rng, rows, width * bits // 8)
    scales = _spread(rng, (rows, width // block), _TABLE_SIZE * 12**0.5 / 2**bits)  # of even values
    points = None
    if zeros:
        points = _random_bytes(rng, rows, -(-width // block // 2))
        points[:] = 0x77 + (points & 0x11)  # 7 or 8, about the middle of the 16 levels
    return QuantizedTable(bits, block, codes, scales, points)


def random_tables(
    config: PreTrainedConfig, head_bits: int, *, block: int = 32, symmetric: bool = False, seed: int = 1
) -> Tables | None:
    """Rounded embedding and head of the kind that `lit_binq_onnx.build.head` makes, with random codes.

    Args:
        config: whose vocabulary, width and tying count.
        head_bits: of the head, 4 or 8; the embedding has 8. 0 gives None.
        block: most weights of a 4-bit head that share a scale; fewer where the width demands it.
        symmetric: a 4-bit head without zero points.
        seed: of the codes.

    Raises:
        LitBinqError: another number of bits, or a width that no block divides.
    """
    if head_bits not in HEAD_BITS:
        raise LitBinqError(f"head_bits: got {head_bits}, expected one of {', '.join(map(str, HEAD_BITS))}")
    if head_bits == 0:
        return None
    rng, size = np.random.default_rng(seed), (config.vocab_size, config.hidden_size)
    embedding = _random_table(rng, *size, 8, largest=32, zeros=False)
    if head_bits == 8 and config.tie_word_embeddings:
        return Tables(embedding, embedding)
    largest, zeros = (block, not symmetric) if head_bits == 4 else (32, False)
    return Tables(embedding, _random_table(rng, *size, head_bits, largest=largest, zeros=zeros))


def weights_of(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of a model's packed layers, and bits of all their stored tensors."""
    layers = packed_linears(model).values()
    return sum(m.in_features * m.out_features for m in layers), sum(m.stored_bits() for m in layers)


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """config.json of a model, as Hugging Face writes it."""
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
