"""What the tests of exports share: tiny packed models and their export."""

from pathlib import Path

import torch
from conftest import VOCAB, byte_tokenizer, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from lit_binq.formats import BinaryLinear, RowColumn
from lit_binq_onnx.export import export_onnx

KINDS = ("llama", "opt", "qwen2", "qwen3")


def random_model(kind: str) -> PreTrainedModel:
    """A tiny dense model; Qwen3 normalizes queries and keys, and its heads are wider than hidden / heads."""
    if kind != "qwen3":
        return tiny_model(kind)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
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


def packed_model(kind: str) -> PreTrainedModel:
    """The same with every linear of its blocks packed: random scales, biases kept."""
    model = random_model(kind)
    generator = torch.Generator().manual_seed(2)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "layers." in name:
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
