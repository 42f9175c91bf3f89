"""Arguments recorded from one window, given to a batch: every block then gives what the model itself computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCAB
from torch import Tensor, nn
from transformers import PreTrainedModel

import architectures
from lit_binq.errors import LitBinqError
from lit_binq.models.block_calls import BlockCall, PerWindow, capture_calls, run_block
from lit_binq.models.blocks import find_blocks

WINDOWS, TOKENS = 3, 40
"""More tokens than the passes that compare have."""


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB - 4, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


def states(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Inputs of every block in an ordinary forward pass over all windows."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in find_blocks(model)]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", [k for k in architectures.CONFIGS if k != "rwkv"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blocks_by_themselves_are_the_models_on_a_batch(kind: str, attention: str, windows: Tensor) -> None:
    model = architectures.make(kind)
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        pytest.skip(f"no {attention} attention: {error}")
    blocks = find_blocks(model)
    calls = capture_calls(model, blocks, windows[:1])
    expected = states(model, windows)
    with torch.no_grad():
        for i, (block, call) in enumerate(zip(blocks[:-1], calls, strict=False)):
            torch.testing.assert_close(run_block(block, expected[i], call), expected[i + 1], rtol=1e-5, atol=1e-5)
            one = run_block(block, expected[i][:1], call)
            torch.testing.assert_close(one, expected[i + 1][:1], rtol=1e-5, atol=1e-5)


def test_no_block_runs_at_full_length(llama: PreTrainedModel, windows: Tensor) -> None:
    lengths: list[int] = []
    llama.model.layers[1].mlp.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    calls = capture_calls(llama, find_blocks(llama), windows[:1])
    assert max(lengths) < TOKENS
    assert calls[1].kwargs["position_embeddings"][0].shape[1] == TOKENS
    assert "forward" not in vars(llama.model.layers[1])


def test_parts_lie_behind_or_between_each_other() -> None:
    part = torch.arange(6).reshape(2, 3)
    assert torch.equal(PerWindow(part, 0).of(2), torch.cat((part, part)))
    assert torch.equal(PerWindow(part, 1, interleaved=True).of(2)[0], torch.tensor([0, 0, 1, 1, 2, 2]))
    assert torch.equal(PerWindow(part[:1], 0).of(3), part[:1].expand(3, 3))


def inject(model: PreTrainedModel, make: Callable[[Tensor], Any]) -> None:
    """Every block gets another argument, made from the tokens (b, T)."""
    tokens: list[Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    for block in find_blocks(model):
        block.register_forward_pre_hook(lambda _, a, k: (a, {**k, "extra": make(tokens[-1])}), with_kwargs=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda tokens: tokens[:, :, None].float(), "depend on the tokens"),
        (lambda tokens: tokens.float().mean(), "depend on the tokens"),
        (lambda tokens: len(tokens), "depend on the number of windows"),
    ],
)
def test_arguments_that_differ_from_window_to_window_are_refused(
    make: Callable[[Tensor], Any], words: str, llama: PreTrainedModel, windows: Tensor
) -> None:
    inject(llama, make)
    with pytest.raises(LitBinqError, match=words) as caught:
        capture_calls(llama, find_blocks(llama), windows[:1])
    assert "\n" not in str(caught.value)


def test_a_model_that_changes_the_states_between_blocks_is_refused(llama: PreTrainedModel, windows: Tensor) -> None:
    llama.model.layers[1].register_forward_pre_hook(lambda _, args: (1.5 * args[0], *args[1:]))
    with pytest.raises(LitBinqError, match="gives block 1 something else than what block 0 put out"):
        capture_calls(llama, find_blocks(llama), windows[:1])


def test_a_block_that_keeps_a_state_of_its_own_is_refused(llama: PreTrainedModel, windows: Tensor) -> None:
    """What it puts out depends on how often it ran."""
    runs: list[None] = []

    def drift(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        runs.append(None)
        return output * (1 + 0.1 * len(runs))

    llama.model.layers[0].mlp.register_forward_hook(drift)
    with pytest.raises(LitBinqError, match=r"block 0 \(LlamaDecoderLayer\) by itself gives other hidden states"):
        capture_calls(llama, find_blocks(llama), windows[:1])


def test_a_block_that_fails_by_itself_is_refused(llama: PreTrainedModel, windows: Tensor) -> None:
    runs: list[None] = []

    def fail(*_: Any) -> None:
        runs.append(None)
        if len(runs) > 1:
            raise IndexError("not\nmade for this")

    llama.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(LitBinqError, match=r"by itself fails \(IndexError: not made for this\)") as caught:
        capture_calls(llama, find_blocks(llama), windows[:1])
    assert "\n" not in str(caught.value)


def test_a_call_without_windows_is_left_as_it_is() -> None:
    call = BlockCall((1, [torch.ones(2), None]), {"a": "text"})
    of = call.of(5)
    assert of.args[0] == 1
    assert torch.equal(of.args[1][0], torch.ones(2))
    assert of.kwargs == {"a": "text"}
