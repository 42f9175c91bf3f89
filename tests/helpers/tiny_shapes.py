"""Tiny shapes that the fused route takes, for models with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from exporting import FUSABLE_SIZES
from lit_binq_onnx.bench.shapes import Shape
from lit_binq_onnx.runtime.session import OnnxModel, positions

IDS = np.random.default_rng(3).integers(0, 260, (1, 9))


def config(kind: str = "llama", **others: Any) -> Any:
    """Tied embeddings and 512 positions where nothing else is said."""
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    options = {**FUSABLE_SIZES, "max_position_embeddings": 512, "tie_word_embeddings": True}
    return kinds[kind](**options | others)


def shape(kind: str = "llama", **others: Any) -> Shape:
    return Shape("tiny", config(kind, **others), 2)


def run(folder: Path, *, parts: tuple[int, ...] = (5, 8, 9)) -> np.ndarray:
    """Logits of IDS without our library, in several passes."""
    model = OnnxModel(folder, native=False, route="fused", threads=1)
    cache, found, start = model.empty_past(1, 16), [], 0
    for stop in parts:
        mask = np.ones((1, stop), np.int64)
        logits, cache = model.forward(IDS[:, start:stop], mask, positions(mask)[:, start:], cache)
        found.append(logits)
        start = stop
    return np.concatenate(found, 1)[0]
