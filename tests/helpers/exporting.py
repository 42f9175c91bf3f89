"""What the tests of exports share: tiny packed models and their export."""

from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB, byte_tokenizer, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lit_binq.formats import BinaryLinear, RowColumn
from lit_binq_onnx.build.export import export_onnx

KINDS = ("llama", "opt", "qwen2", "qwen3")


def random_model(kind: str, blocks: int = 2) -> PreTrainedModel:
    """A tiny dense model; Qwen3 normalizes queries and keys, and its heads are wider than hidden / heads."""
    if kind != "qwen3":
        return tiny_model(kind, blocks=blocks)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


FUSABLE_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Of a configuration that the fused route takes: heads of 16, two query heads to a key head."""

FUSED_KINDS = ("llama", "llama3-rope", "mistral", "qwen2", "qwen3")


def fusable_model(kind: str) -> PreTrainedModel:
    """A tiny packed model that the fused route fits: heads of 16, two query heads to a key head.

    LLaMA's and Qwen3's embeddings are tied, the others' not; Mistral sees 8 tokens, Qwen2 has biases and, in its second
    block only, a window of 6; "llama3-rope" is a LLaMA with scaled angles.
    """
    options: dict[str, Any] = {
        **FUSABLE_SIZES,
        "max_position_embeddings": 128,
        "tie_word_embeddings": kind in ("llama", "qwen3"),
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    configs: dict[str, PreTrainedConfig] = {
        "llama": LlamaConfig(**options),
        "llama3-rope": LlamaConfig(**options, rope_parameters={**rope, "original_max_position_embeddings": 32}),
        "mistral": MistralConfig(**options, sliding_window=8),
        "qwen2": Qwen2Config(**options, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "qwen3": Qwen3Config(**options),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(configs[kind], dtype=torch.float32)
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 1 + 0.1 * noise if "norm.weight" in name else 0.15 * noise
    return pack_linears(model.eval())


def packed_model(kind: str) -> PreTrainedModel:
    """The same with every linear of its blocks packed: random scales, biases kept."""
    return pack_linears(random_model(kind))


def pack_linears(model: PreTrainedModel, *, every: bool = False) -> PreTrainedModel:
    """Pack every linear of a model's blocks, or `every` one but the head, in place: random scales, biases kept."""
    generator, head = torch.Generator().manual_seed(2), model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ("layers." in name or (every and linear is not head)):
            W = linear.weight.detach()
            c = 0.5 + torch.rand(W.shape[1], generator=generator)
            solution = RowColumn(W.abs().mean(1), c, torch.where(W >= 0, 1.0, -1.0))
            model.set_submodule(name, BinaryLinear.from_solution(solution, linear.bias))
    return model


def export(kind: str, folder: Path) -> PreTrainedModel:
    """Export a packed model without checking it; returns the model."""
    model = packed_model(kind)
    export_onnx(model, byte_tokenizer(), folder, check=False)
    return model
