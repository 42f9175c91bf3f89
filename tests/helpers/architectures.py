"""Tiny random models of architectures that differ in what their blocks are and get."""

from typing import Any

import torch
import transformers
from conftest import VOCAB
from transformers import AutoModelForCausalLM, PreTrainedModel

_IDS = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # ALiBi, a slab a window and head
    "falcon": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False},
    ),
    "recurrent_gemma": (  # recurrences and attention in turn, arguments by their place
        "RecurrentGemmaConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 16,
            "block_types": ("recurrent", "recurrent", "attention"),
        },
    ),
    "trocr": (  # a mask that must not be broadcast
        "TrOCRConfig",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    ),
    "gpt_neo": (  # attention that reaches back only so far, in every other block
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 128,
        },
    ),
    "dynamic": (  # rotary embeddings that depend on how many positions there are
        "LlamaConfig",
        _LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "lfm2": ("Lfm2Config", _LLAMA | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "gemma3": ("Gemma3TextConfig", _LLAMA | {"head_dim": 8, "sliding_window": 8}),
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}),
}


def make(kind: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model in float32 and evaluation mode; `options` change its configuration."""
    name, settings = CONFIGS[kind]
    config = getattr(transformers, name)(**_IDS | settings | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = 0.15 * torch.randn_like(parameter)
    return model.eval()
