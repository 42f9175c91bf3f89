"""Finding blocks and running them one by one: exactly what the model itself computes."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats.registry import empty_layer
from lit_binq.models.blocks import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    linear_groups,
    linear_input,
    norm_parameters,
    replace_module,
    run_block,
)

WINDOWS, TOKENS = 3, 12

LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
OPT_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.out_proj"],
    ["fc1"],
    ["fc2"],
]
GROUPS = {"llama": LLAMA_GROUPS, "qwen2": LLAMA_GROUPS, "opt": OPT_GROUPS}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


def decoder(model: PreTrainedModel) -> Any:
    """The module that holds the blocks and the final norm."""
    return model.model.decoder if model.config.model_type == "opt" else model.model


def final_norm(model: PreTrainedModel) -> nn.Module:
    return decoder(model).final_layer_norm if model.config.model_type == "opt" else decoder(model).norm


def recorded_inputs(model: PreTrainedModel, module: nn.Module, windows: Tensor) -> Tensor:
    """The first argument `module` gets in the model's own forward pass."""
    seen: list[Tensor] = []
    with torch.no_grad(), module.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(input_ids=windows, use_cache=False)
    (only,) = seen
    return only


# ---- finding -------------------------------------------------------------------------------------------------------


def test_the_blocks_are_the_decoders(any_model: PreTrainedModel) -> None:
    assert find_blocks(any_model) is decoder(any_model).layers


def test_other_module_lists_are_passed_over(llama: PreTrainedModel) -> None:
    llama.extra = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))  # longer, but not one entry a layer
    llama.norms = nn.ModuleList(nn.LayerNorm(3) for _ in range(2))
    assert find_blocks(llama) is llama.model.layers


def test_packed_blocks_are_found_too(llama: PreTrainedModel) -> None:
    for block in llama.model.layers:
        for name, m in list(block.named_modules()):
            if isinstance(m, nn.Linear):
                replace_module(block, name, empty_layer(m, {"format": "row_column"}))
    assert find_blocks(llama) is llama.model.layers


def test_gpt2_is_refused_in_one_line() -> None:
    """Its linear layers are Conv1D, with transposed weights."""
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    )
    with pytest.raises(LitBinqError, match=r"unknown architecture GPT2LMHeadModel: .* change the option `model`") as e:
        find_blocks(model)
    assert "\n" not in str(e.value)


def test_a_model_without_blocks_is_refused(llama: PreTrainedModel) -> None:
    llama.model.layers = nn.ModuleList()
    with pytest.raises(LitBinqError, match="found no list of decoder blocks"):
        find_blocks(llama)


# ---- running block by block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # with the mask left to the kernel, or given as a tensor
def test_the_chain_of_blocks_is_the_model(any_model: PreTrainedModel, windows: Tensor, attention: str) -> None:
    any_model.set_attn_implementation(attention)
    blocks = find_blocks(any_model)
    calls = capture_calls(any_model, blocks, windows[:1])
    assert len(calls) == len(blocks)
    hidden = embed(any_model, blocks, windows)
    assert hidden.shape == (WINDOWS, TOKENS, 32)
    with torch.no_grad():
        for block, call in zip(blocks, calls, strict=True):
            torch.testing.assert_close(hidden, recorded_inputs(any_model, block, windows), rtol=1e-6, atol=1e-6)
            hidden = run_block(block, hidden, call)
        logits = any_model.lm_head(final_norm(any_model)(hidden))
        expected = any_model(input_ids=windows, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert float(expected.std()) > 0.05


def test_tokens_do_not_see_the_future(any_model: PreTrainedModel, windows: Tensor) -> None:
    """The recorded call keeps the causal mask, whichever way the model passes it."""
    blocks = find_blocks(any_model)
    call = capture_calls(any_model, blocks, windows[:1])[0]
    hidden = embed(any_model, blocks, windows)
    changed = hidden.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        a, b = (run_block(blocks[0], h, call) for h in (hidden, changed))
    torch.testing.assert_close(a[:, :-1], b[:, :-1])
    assert not torch.allclose(a[:, -1], b[:, -1])


def test_calls_hold_no_cache_and_no_hidden_states(any_model: PreTrainedModel, windows: Tensor) -> None:
    for call in capture_calls(any_model, find_blocks(any_model), windows[:1]):
        assert not {"hidden_states", "past_key_values", "past_key_value"} & call.kwargs.keys()
        assert call.kwargs["use_cache"] is False


def test_a_model_that_leaves_blocks_out_is_refused(make_model: Callable[..., PreTrainedModel], windows: Tensor) -> None:
    model = make_model("llama", blocks=3)
    blocks = find_blocks(model)
    model.config.num_hidden_layers = 2
    with pytest.raises(LitBinqError, match="ran 2 of its 3 blocks"):
        capture_calls(model, blocks, windows[:1])


def test_no_hook_is_left_behind(any_model: PreTrainedModel, windows: Tensor) -> None:
    blocks = find_blocks(any_model)
    calls = capture_calls(any_model, blocks, windows[:1])
    hidden = embed(any_model, blocks, windows)
    groups = linear_groups(blocks[0], hidden, calls[0])
    linear_input(blocks[0], groups[0][0], hidden, calls[0])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in any_model.modules())


def test_call_moves_every_tensor_however_deep() -> None:
    one = torch.ones(1)
    call = BlockCall((one, [one, "text"]), {"a": (one, None), "b": {"c": one}, "d": 3}).to(torch.device("meta"))
    assert call.args[0].is_meta
    assert call.args[1][0].is_meta
    assert call.args[1][1] == "text"
    assert call.kwargs["a"][0].is_meta
    assert call.kwargs["a"][1] is None
    assert call.kwargs["b"]["c"].is_meta
    assert call.kwargs["d"] == 3


# ---- linear layers -------------------------------------------------------------------------------------------------


def test_groups_share_their_input(any_model: PreTrainedModel, windows: Tensor) -> None:
    blocks = find_blocks(any_model)
    for block, call in zip(blocks, capture_calls(any_model, blocks, windows[:1]), strict=True):
        groups = linear_groups(block, embed(any_model, blocks, windows[:1]), call)
        assert groups == GROUPS[any_model.config.model_type]


def test_linear_input_is_what_a_hook_records(any_model: PreTrainedModel, windows: Tensor) -> None:
    blocks = find_blocks(any_model)
    calls = capture_calls(any_model, blocks, windows[:1])
    for block, call in zip(blocks, calls, strict=True):
        hidden = recorded_inputs(any_model, block, windows)
        for name in itertools.chain(*GROUPS[any_model.config.model_type]):
            expected = recorded_inputs(any_model, block.get_submodule(name), windows)
            found = linear_input(block, name, hidden, call)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert not found.requires_grad


def test_linear_input_computes_nothing_behind_the_layer(llama: PreTrainedModel, windows: Tensor) -> None:
    blocks = find_blocks(llama)
    call = capture_calls(llama, blocks, windows[:1])[0]
    ran: list[str] = []
    blocks[0].mlp.gate_proj.register_forward_hook(lambda *_: ran.append("gate"))
    linear_input(blocks[0], "self_attn.o_proj", embed(llama, blocks, windows), call)
    assert ran == []


class Block(nn.Module):
    """Two layers, one of them perhaps called again or never."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.first, self.second, self.mode = nn.Linear(4, 4), nn.Linear(4, 4), mode

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        hidden = self.first(hidden)
        if self.mode == "twice":
            hidden = self.first(hidden)
        return hidden if self.mode == "never" else self.second(hidden)


def test_a_layer_called_twice_is_refused() -> None:
    with pytest.raises(LitBinqError, match="linear layer first is called twice in one block") as caught:
        linear_groups(Block("twice"), torch.ones(1, 2, 4), BlockCall())
    assert "\n" not in str(caught.value)


def test_a_layer_never_called_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lit_binq.models.blocks"):
        assert linear_groups(Block("never"), torch.ones(1, 2, 4), BlockCall()) == [["first"]]
    assert "never called, left at full precision: second" in caplog.text
    assert linear_groups(Block("once"), torch.ones(1, 2, 4), BlockCall()) == [["first"], ["second"]]


def test_replace_module(llama: PreTrainedModel) -> None:
    new = nn.Linear(1, 1)
    replace_module(llama.model.layers[1], "mlp.down_proj", new)
    assert llama.model.layers[1].mlp.down_proj is new
    root = nn.Sequential(nn.Linear(1, 1))
    replace_module(root, "0", new)
    assert root[0] is new


def test_norm_parameters_are_weights_and_biases_of_norms_only(any_model: PreTrainedModel) -> None:
    names = set(norm_parameters(find_blocks(any_model)[0]))
    if any_model.config.model_type == "opt":  # its linear layers have biases as well
        layers = ("self_attn_layer_norm", "final_layer_norm")
        assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    else:
        assert names == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    whole = norm_parameters(any_model)
    assert len(whole) == 2 * len(names) + (2 if any_model.config.model_type == "opt" else 1)
    assert all(p is any_model.get_parameter(name) for name, p in whole.items())
