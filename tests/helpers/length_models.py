"""Tiny models in which something depends on the length of the text, packed, and the same in plain transformers.

The other is made from the packed bits by numpy: nothing of the project computes in it.
"""

from typing import Any

import numpy as np
import torch
import transformers as hf
from conftest import VOCAB
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from exporting import pack_linears
from lit_binq.formats import BinaryLinear

ORIGINAL = 300
"""Longest text with the first angles, where they are scaled: beyond one part of a prompt."""

WINDOW = 40
"""Beyond the 26 tokens that any check reads."""

_SPECIAL: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_SIZES: dict[str, Any] = {
    **_SPECIAL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


def _scaled(kind: str, **others: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **others}


def length_config(kind: str) -> PreTrainedConfig:
    """Configuration by name; `LENGTH_KINDS` lists them."""
    sizes, special = _SIZES, _SPECIAL
    original = {"original_max_position_embeddings": ORIGINAL}
    if kind == "phi3-longrope":
        return hf.Phi3Config(**sizes, **original, rope_parameters=_LONG)
    if kind == "llama-dynamic":
        return hf.LlamaConfig(**{**sizes, "max_position_embeddings": ORIGINAL}, rope_parameters=_scaled("dynamic"))
    if kind == "llama-yarn":
        return hf.LlamaConfig(**sizes, rope_parameters=_scaled("yarn", **original))
    if kind == "llama-linear":
        return hf.LlamaConfig(**sizes, rope_parameters=_scaled("linear"))
    if kind == "llama-llama3":
        bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return hf.LlamaConfig(**sizes, rope_parameters=_scaled("llama3", **bands, **original))
    if kind == "mistral":
        return hf.MistralConfig(**sizes, sliding_window=WINDOW)
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        return hf.Gemma3TextConfig(**sizes, head_dim=16, sliding_window=WINDOW, layer_types=kinds)
    if kind == "gpt-neo":
        pattern = [[["global", "local"], 1]]
        neo = {"num_layers": 2, "num_heads": 4, "attention_types": pattern, "window_size": WINDOW}
        return hf.GPTNeoConfig(**special, hidden_size=64, max_position_embeddings=1024, **neo)
    if kind == "bloom":
        return hf.BloomConfig(**special, hidden_size=64, n_layer=2, n_head=4)
    assert kind == "falcon-alibi"
    alibi = {"alibi": True, "new_decoder_architecture": False, "multi_query": False}
    return hf.FalconConfig(**special, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **alibi)


LENGTH_KINDS = ("phi3-longrope", "llama-dynamic", "llama-yarn", "llama-linear", "llama-llama3", "mistral", "gemma3",
                "gpt-neo", "bloom", "falcon-alibi")  # fmt: skip


def length_model(kind: str) -> PreTrainedModel:
    """A packed random model, every linear but the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(length_config(kind), dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.data = 1 + 0.1 * noise if is_norm else 0.15 * noise
    return pack_linears(model, every=True)


def dense_weight(layer: BinaryLinear) -> torch.Tensor:
    """(N, K) float32: what a packed linear of the row x column format multiplies by."""
    bits = np.unpackbits(layer.codes.numpy(), axis=1, bitorder="little")[:, : layer.in_features]
    r, c = (t.numpy().astype(np.float32) for t in (layer.row_scale, layer.col_scale))
    return torch.from_numpy(r[:, None] * (2 * bits.astype(np.float32) - 1) * c)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in plain transformers, made anew from its configuration with dense weights."""
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, BinaryLinear):
            state[f"{name}.weight"] = dense_weight(module)
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias
        else:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            state |= {f"{name}.{leaf}": tensor.detach() for leaf, tensor in own}
    wanted = other.state_dict()
    other.load_state_dict({name: state[name] for name in wanted})
    assert not any(isinstance(m, BinaryLinear) for m in other.modules())
    assert any(isinstance(m, nn.Linear) for m in other.modules())
    return other


@torch.no_grad()
def plain_logits(
    other: PreTrainedModel, ids: np.ndarray, parts: list[tuple[int, int]], mask: np.ndarray | None = None
) -> np.ndarray:
    """Logits (b, n, V) of a text read part by part with transformers' own cache.

    Args:
        ids: (b, n) int64.
        parts: (first, end) of each.
        mask: (b, n), 0 at padding; None: no padding.
    """
    mask = np.ones_like(ids) if mask is None else mask
    where = np.maximum(mask.cumsum(1) - 1, 0)
    # the dynamic embedding remembers the longest text it has seen, until it sees a short one
    other(input_ids=torch.zeros(1, 1, dtype=torch.long))
    cache, found = DynamicCache(), []
    for start, end in parts:
        out = other(
            input_ids=torch.from_numpy(ids[:, start:end]),
            attention_mask=torch.from_numpy(mask[:, :end]),
            position_ids=torch.from_numpy(where[:, start:end]),
            past_key_values=cache,
            use_cache=True,
        )
        found.append(out.logits.numpy())
    return np.concatenate(found, axis=1)
