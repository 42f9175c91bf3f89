"""True bits: every matrix inside the blocks counts, what is not packed too; what cannot be packed at all is refused."""

import json
import logging
from pathlib import Path

import gguf
import pytest
import torch
from conftest import VOCAB, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    JetMoeConfig,
    Lfm2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)
from transformers.pytorch_utils import Conv1D

from fitting import fit
from gguf_cases import add_shape, finish
from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.calibration.preflight.checks import PreflightOptions
from lit_binq.errors import LitBinqError
from lit_binq.evaluation.module import PackedEvaluation
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.unquantized import round_unquantized
from lit_binq.hub.bits import true_bits
from lit_binq.hub.save_load import load_packed
from lit_binq.models.load import load_model
from packed_models import pack

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 258}


@pytest.mark.parametrize(("rest", "bits"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 32)])
def test_what_stays_at_full_precision_counts_with_its_own_bits(rest: torch.dtype, bits: int) -> None:
    model = pack(tiny_model("llama"))
    layers = [m for m in model.modules() if hasattr(m, "weight_buffers")]
    packed_bits = sum(8 * t.nbytes for m in layers for t in m.weight_buffers().values())
    weights = sum(m.in_features * m.out_features for m in layers)
    assert true_bits(model) == packed_bits / weights
    block = model.model.layers[1]
    block.spare, block.mixer, block.experts = nn.Linear(24, 8), Conv1D(16, 24), nn.Module()
    block.experts.gate_up_proj = nn.Parameter(torch.ones(3, 8, 8))
    model.model.outside = nn.Linear(1000, 1000)
    round_unquantized(model, rest)
    left = 24 * 8 + 24 * 16 + 3 * 8 * 8
    assert true_bits(model) == (packed_bits + bits * left) / (weights + left)
    assert true_bits(model, [model.model.layers[0]]) == packed_bits / weights  # its two blocks are alike


def test_a_fit_counts_what_it_reports(tokenizer, text_file, tmp_path, caplog) -> None:
    """LFM2's blocks hold short convolutions beside linear layers."""
    config = Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="lit_binq"):
        options = {"tuning": BlockTuning(), "end_to_end": ModelTuning(), "preflight": PreflightOptions(torch_only=True)}
        fit(tmp_path / "model", text_file, tmp_path / "packed", **options)
    dense = load_file(tmp_path / "model" / "model.safetensors")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    inside = {n: t for n, t in dense.items() if ".layers." in n and t.dim() > 1}
    outside = {n for n, t in dense.items() if n not in inside}
    bits = sum(8 * t.nbytes for n, t in stored.items() if n not in outside)
    expected = bits / sum(t.numel() for t in inside.values())
    assert read_manifest(tmp_path / "packed")["true_bits"] == pytest.approx(expected, abs=1e-12)
    assert true_bits(load_packed(tmp_path / "packed")[0]) == pytest.approx(expected, abs=1e-12)
    assert "conv.conv.weight" in {n.partition("layers.0.")[2] for n in inside}
    assert "1 matrices inside the blocks" in caplog.text
    assert f"{expected:.3f} true bits" in caplog.text


EXPERTS = [
    MixtralConfig(**SMALL, num_local_experts=4),
    Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    GptOssConfig(**SMALL, num_local_experts=4, head_dim=8, quantization_config=None),
    JetMoeConfig(**SMALL, num_local_experts=4, kv_channels=8),
]


@pytest.mark.parametrize("config", EXPERTS, ids=lambda c: c.model_type)
def test_fused_experts_are_refused_before_any_weight_is_read(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(LitBinqError, match="mixture of experts that are fused into one tensor") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "change the option `model`" in str(caught.value)


def with_surplus(folder: Path, **tensors: torch.Tensor) -> str:
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {k.replace("__", "."): t for k, t in tensors.items()}, folder / "model.safetensors")
    return str(folder)


BIASES = {
    f"model__layers__{i}__self_attn__{p}_proj__bias": torch.ones(32 if p == "q" else 16) for i in (0, 1) for p in "qkv"
}


def test_tensors_that_the_model_does_not_take_are_refused(make_source) -> None:
    """Biases of queries, keys and values, where the configuration does not say `attention_bias`."""
    source = with_surplus(make_source(), **BIASES)
    with pytest.raises(
        LitBinqError, match=r"LlamaForCausalLM does not take 6 tensors.*layers\.0\.self_attn\.k"
    ) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)
    assert "option `drop_tensors`" in str(caught.value)
    path = Path(source) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    with pytest.raises(LitBinqError, match="lacks 2 tensors"):  # o_proj's
        load_model(source)


@pytest.mark.parametrize("patterns", [[r"\.self_attn\.[qkv]_proj\.bias"], ["bias"], [r"0\.self_attn", r"1\.self_attn"]])
def test_they_may_be_named_to_be_dropped(patterns, make_source, make_model) -> None:
    model = load_model(with_surplus(make_source(), **BIASES), drop_tensors=patterns)
    plain = make_model("llama")
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters())


def test_what_transformers_makes_itself_may_be_there(make_source) -> None:
    load_model(with_surplus(make_source(), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)))


def test_a_fit_and_its_evaluation_take_the_option(make_source, text_file, tmp_path) -> None:
    source = Path(with_surplus(make_source(blocks=1), surplus=torch.ones(3)))
    closed = {"tuning": BlockTuning(), "end_to_end": ModelTuning()}
    with pytest.raises(LitBinqError, match=r"does not take 1 tensors.*surplus"):
        fit(source, text_file, tmp_path / "packed", **closed)
    fit(source, text_file, tmp_path / "packed", **closed, drop_tensors=["^surplus$"])
    evaluation = PackedEvaluation(str(source), str(tmp_path / "packed"), drop_tensors=["^surplus$"])
    assert evaluation.load_source().num_parameters() > 0
    with pytest.raises(LitBinqError, match="surplus"):
        PackedEvaluation(str(source), str(tmp_path / "packed")).load_source()
    with pytest.raises(LitBinqError, match=r"drop_tensors: '\(' is no regular expression"):
        PackedEvaluation(str(source), str(tmp_path / "packed"), drop_tensors=["("])


def test_so_are_those_of_a_gguf_file(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "qwen3moe")
    add_shape(writer)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(16)
    writer.add_vocab_size(VOCAB)
    finish(writer)  # there are no weights
    with pytest.raises(LitBinqError, match="mixture of experts that are fused into one tensor"):
        load_model(str(tmp_path / "experts.gguf"))
