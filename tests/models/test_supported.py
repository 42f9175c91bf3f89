"""What export cannot carry is known before a fit; what depends on a text's length comes out as transformers has it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import VOCAB, byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig

from length_models import LENGTH_KINDS, length_config, length_model, plain_copy, plain_logits
from lit_binq.errors import LitBinqError
from lit_binq.models.supported import unsupported_reason
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.session import OnnxModel, positions

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "lfm2": (hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "blocks of kind conv"),
    "mamba": (hf.MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8), "state"),
    "recurrent-gemma": (hf.RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=64), "state"),
    "rwkv": (hf.RwkvConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2), "recurrent state"),
    "qwen3-next": (
        hf.Qwen3NextConfig(**SIZES, num_experts=0, layer_types=["linear_attention", "full_attention"]),
        "blocks of kind linear_attention",
    ),
    "xlnet": (hf.XLNetConfig(vocab_size=VOCAB, d_model=64, n_layer=2, n_head=4), "no past_key_values"),
    "deepseek-v2": (
        hf.DeepseekV2Config(**{**SIZES, "num_key_value_heads": 4}, **LATENT, v_head_dim=8, first_k_dense_replace=2),
        "complex numbers",
    ),
    "mixtral": (hf.MixtralConfig(**SIZES, num_local_experts=2), "experts in one tensor"),
}


def meta_model(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_export_cannot_carry_is_known_without_weights(kind: str) -> None:
    config, reason = REFUSED[kind]
    told = unsupported_reason(meta_model(config))
    assert told is not None
    assert reason in told
    assert "fit, validate and everything else in torch do not need it" in told
    assert "\n" not in told


@pytest.mark.parametrize("kind", LENGTH_KINDS)
def test_what_depends_on_length_is_no_reason(kind: str) -> None:
    assert unsupported_reason(meta_model(length_config(kind))) is None


def test_angles_of_an_unknown_kind() -> None:
    model = meta_model(length_config("llama-dynamic"))
    model.config.rope_parameters["rope_type"] = "spiral"
    assert "rotary embedding 'spiral'" in str(unsupported_reason(model))
    model = meta_model(length_config("llama-dynamic"))
    model.model.rotary_emb = torch.nn.Identity()
    assert "depend on the text's length, in a form of its own" in str(unsupported_reason(model))


def test_export_asks_first(tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match="export: XLNetLMHeadModel takes no past_key_values"):
        export_onnx(meta_model(REFUSED["xlnet"][0]), byte_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def onnx_logits(
    model: OnnxModel, ids: np.ndarray, parts: list[tuple[int, int]], mask: np.ndarray | None = None
) -> np.ndarray:
    mask = np.ones_like(ids) if mask is None else mask
    where, past, found = positions(mask), model.empty_past(len(ids)), []
    for start, end in parts:
        logits, past = model.forward(ids[:, start:end], mask[:, :end], where[:, start:end], past)
        found.append(logits.copy())
    return np.concatenate(found, axis=1)


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", LENGTH_KINDS)
def test_every_length_equals_transformers(kind: str, tmp_path: Path) -> None:
    """In one pass, in parts, token by token over every border, and a short row beside a long one."""
    model = length_model(kind)
    export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)
    other = plain_copy(model)
    ids = np.random.default_rng(0).integers(0, 256, (2, 420))
    steps = [(i, i + 1) for i in range(298, 304)]
    for route in ("generic", "auto"):
        session = OnnxModel(tmp_path / "out", native=False, route=route)
        for parts in ([(0, 420)], [(0, 256), (256, 420)], [(0, 20), (20, 298), *steps, (304, 420)]):
            expected = plain_logits(other, ids[:1], parts)
            got = onnx_logits(session, ids[:1], parts)
            np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    mask = np.ones_like(ids)
    mask[0, :390] = 0
    seen = mask.astype(bool)
    session = OnnxModel(tmp_path / "out", native=False, route="generic")
    expected = plain_logits(other, ids, [(0, 420)], mask)[seen]
    got = onnx_logits(session, ids, [(0, 420)], mask)[seen]
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
