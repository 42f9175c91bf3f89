"""Rounding of the rest: overflow and underflow that would change a result are refused before a fit begins."""

import pytest
import torch
from conftest import VOCAB, tiny_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq.formats.unquantized import round_unquantized
from lit_binq.hub.save_load import load_packed, save_packed
from packed_models import logits, pack
from staging import workspace


@torch.no_grad()
def with_embeddings(scale: float) -> LlamaForCausalLM:
    """A LLaMA that does not care how large its embeddings are: the first thing behind them is a norm."""
    model = tiny_model("llama", tied=False)
    model.config.rms_norm_eps = 0.0
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    model.model.embed_tokens.weight.mul_(scale)
    for layer in model.model.layers:  # what is added to them is of their size
        layer.self_attn.o_proj.weight.mul_(scale)
        layer.mlp.down_proj.weight.mul_(scale)
    return model


def test_tiny_embeddings_before_a_norm_are_refused_at_the_start() -> None:
    tiny = with_embeddings(1e-9).to(torch.bfloat16).float()
    torch.testing.assert_close(logits(tiny), logits(with_embeddings(1.0)), atol=0.05, rtol=0.05)
    zeros = with_embeddings(1e-9)
    zeros.model.embed_tokens.weight.data = zeros.model.embed_tokens.weight.half().float()
    assert not zeros.model.embed_tokens.weight.any()  # what was stored
    with pytest.raises(
        LitBinqError, match=r"model\.embed_tokens\.weight has values too small for float16: row"
    ) as caught:
        workspace(tiny)
    assert "\n" not in str(caught.value)
    assert "lose 100.0%, expected at most 0.4%: set the option `unquantized_dtype` to bfloat16" in str(caught.value)
    for dtype in (torch.bfloat16, torch.float32):
        workspace(tiny, unquantized_dtype=dtype)


def test_bfloat16_holds_them(tokenizer, tmp_path) -> None:
    model = pack(with_embeddings(1.0))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-9)
    with pytest.raises(LitBinqError, match="embed_tokens"):
        save_packed(model, tokenizer, tmp_path / "p", facts={})
    assert list(tmp_path.iterdir()) == []
    before = logits(model)
    save_packed(model, tokenizer, tmp_path / "p", facts={}, unquantized_dtype=torch.bfloat16)
    again = load_packed(tmp_path / "p")[0].model.embed_tokens.weight
    torch.testing.assert_close(again, model.model.embed_tokens.weight)
    torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("scale", "held"), [(1.0, True), (1e-4, True), (5e-5, True), (1e-5, False), (1e-12, False)])
def test_where_float16_ends(scale: float, held: bool) -> None:
    """Entries of 0.15 x scale: below about 5e-6 the steps of float16, 6e-8, are more than 1/256 of them."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    embedding = nn.Embedding.from_pretrained(0.15 * scale * weight, freeze=False)
    exact = embedding.weight.detach().clone()
    losses = (exact - exact.half().float()).norm(dim=1) / exact.norm(dim=1)
    assert bool((losses < 2**-8).all()) == held
    if held:
        round_unquantized(embedding)
        assert torch.equal(embedding.weight, exact.half().float())
    else:
        with pytest.raises(LitBinqError, match="too small"):
            round_unquantized(embedding)
        assert torch.equal(embedding.weight, exact)


@torch.no_grad()
def test_tiny_values_beside_others_and_untrained_rows_do_no_harm() -> None:
    """Also a row of zeros, and all of it in one matrix that is head and embedding."""
    model = tiny_model("llama")
    weight = model.model.embed_tokens.weight
    weight[3, ::2] = 1e-9
    weight[4] = 1e-23
    weight[5] = 1e-9 * torch.randn(32)
    weight[6] = 0
    work = workspace(model)
    assert torch.equal(work.student.lm_head.weight, weight.half().float())


@torch.no_grad()
@pytest.mark.parametrize("where", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
@pytest.mark.parametrize(("value", "message"), [(1e-9, "values too small"), (1e6, r"values up to 1e\+06")])
def test_norms_are_asked_at_the_start_in_blocks_too(where: str, value: float, message: str) -> None:
    model = tiny_model("llama")
    model.get_parameter(where).fill_(value)
    with pytest.raises(LitBinqError, match=rf"tensor {where} has {message}"):
        workspace(model)


@torch.no_grad()
def test_a_norm_that_adds_one_may_have_tiny_weights() -> None:
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, query_pre_attn_scalar=8,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    model.model.embed_tokens.weight.normal_()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.normal_().mul_(1e-9)
    workspace(model)


@torch.no_grad()
def test_biases_are_seen_beside_their_weights() -> None:
    linear = nn.Linear(32, 16)
    linear.bias.normal_().mul_(1e-9)
    round_unquantized(linear)
    assert not linear.bias.any()
    linear.bias.normal_().mul_(1e-9)
    linear.weight.zero_()
    with pytest.raises(LitBinqError, match="tensor bias has values too small"):
        round_unquantized(linear)
    norm = nn.LayerNorm(32)
    norm.bias.normal_().mul_(1e-9)
    round_unquantized(norm)
    norm.weight.zero_()
    norm.bias.normal_().mul_(1e-9)
    with pytest.raises(LitBinqError, match="tensor bias has values too small"):
        round_unquantized(norm)


@torch.no_grad()
def test_a_packed_layers_bias_too() -> None:
    model = pack(tiny_model("opt"))
    layer = model.model.decoder.layers[0].fc1
    layer.bias.normal_().mul_(1e-9)
    round_unquantized(model)
    layer.row_scale.zero_()
    layer.bias.normal_().mul_(1e-9)
    with pytest.raises(LitBinqError, match=r"layers\.0\.fc1\.bias has values too small"):
        round_unquantized(model)


@torch.no_grad()
def test_rows_of_a_head_are_compared_with_each_other() -> None:
    model = tiny_model("llama", tied=False)
    model.lm_head.weight[7].mul_(1e-8)  # a logit of nothing beside the others
    workspace(model)
    model.lm_head.weight.mul_(1e-6)
    with pytest.raises(LitBinqError, match=r"lm_head\.weight has values too small"):
        workspace(model)


def test_persistent_buffers_are_rounded_and_others_are_not() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.tensor([1.00001, 3.0]))
    module.register_buffer("made", torch.tensor([1.00001, 3.0]), persistent=False)
    round_unquantized(module)
    assert module.kept.tolist() == [1.0, 3.0]
    assert module.made[0] != 1.0


def test_strides_become_plain() -> None:
    """Products of the same numbers in another order of memory may differ in their last bits."""
    linear = nn.Linear(8, 6)
    linear.weight.data = torch.randn(8, 6).T
    round_unquantized(linear)
    assert linear.weight.is_contiguous()


def test_a_preflight_asks_for_it(make_source, tokenizer, text_file, tmp_path, capsys) -> None:
    """Also where nothing is fitted: `--preflight_only`."""
    source = make_source(blocks=1)
    model = tiny_model("llama", blocks=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-8)
    model.save_pretrained(source)
    options = {"model.model": source, "model.packed": tmp_path / "packed", "data.train.path": text_file}
    options |= {"data.window_length": 24, "data.windows": 6, "evaluate": "false", "preflight_only": "true"}
    arguments = [f"--{name}={value}" for name, value in (options | {"trainer.accelerator": "cpu"}).items()]
    assert cli.main(["fit", *arguments]) == 1
    assert "model.embed_tokens.weight has values too small for float16" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()
