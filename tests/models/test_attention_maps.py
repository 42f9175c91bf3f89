"""Attention maps against the models' own."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from block_cases import LENGTH, WINDOWS, Case, make_case
from lit_binq.models.attention_maps import NoAttentionMaps, attention_maps
from lit_binq.models.blocks import BlockCall, capture_calls, embed, find_blocks, run_block
from lit_binq.models.kv_cache import kv_bits, set_kv_bits


@pytest.fixture
def case(any_model: PreTrainedModel) -> Case:
    return make_case(any_model)


def own_maps(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return list(eager(input_ids=windows, output_attentions=True, use_cache=False).attentions)


def mistral() -> PreTrainedModel:
    """Attention reaches back three tokens only."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, max_position_embeddings=64,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2", "mistral"])
def test_attention_maps_are_the_models_own(kind: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = mistral() if kind == "mistral" else make_model(kind)
    windows = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    blocks, expected = find_blocks(model), own_maps(model, windows)
    calls, hidden = capture_calls(model, blocks, windows), embed(model, blocks, windows)
    with torch.no_grad():
        for block, call, own in zip(blocks, calls, expected, strict=True):
            output = run_block(block, hidden, call)
            (found,) = attention_maps(block, hidden, call, output).values()
            torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)
            hidden = output
    reach = found.detach()[0, 0, -1].nonzero()
    assert int(reach.min()) == (LENGTH - 3 if kind == "mistral" else 0)


def test_maps_of_quantized_keys_are_of_quantized_keys(llama: PreTrainedModel) -> None:
    """Eager attention for a while, of keys at four bits as before; afterwards the configuration is as it was."""
    case = make_case(llama)
    block, hidden = copy.deepcopy(case.reference), case.x[:1]
    set_kv_bits(block, 4)
    with torch.no_grad():
        (quantized,) = attention_maps(block, hidden, case.call, run_block(block, hidden, case.call)).values()
        (plain,) = attention_maps(case.reference, hidden, case.call).values()
    assert kv_bits(block) == 4
    assert float((quantized - plain).abs().max()) > 1e-5


def test_divergence_is_the_mean_kl_of_the_maps(case: Case) -> None:
    record = case.measure()
    rows: list[float] = []
    for w in range(WINDOWS):
        (p,) = attention_maps(case.reference, case.x[w : w + 1], case.call).values()
        (q,) = attention_maps(case.module, case.x_tilde[w : w + 1], case.call).values()
        for a, b in zip(p.double().reshape(-1, LENGTH), q.double().reshape(-1, LENGTH), strict=True):
            rows.append(sum(float(u) * math.log(float(u) / float(v)) for u, v in zip(a, b, strict=True) if u > 0))
    assert record.attention_divergence == pytest.approx(sum(rows) / len(rows), rel=1e-3)
    assert record.attention_divergence > 1e-4
    assert case.measure(attention=False).attention_divergence is None


def test_maps_that_belong_to_another_output_are_refused(llama: PreTrainedModel) -> None:
    """Were the mask lost, eager attention would look ahead: its output says so."""
    case = make_case(llama)
    hidden = case.x[:1]
    with pytest.raises(NoAttentionMaps, match="changes the block's output"):
        attention_maps(case.reference, hidden, case.call, 1.01 * run_block(case.reference, hidden, case.call))
    odd = BlockCall(case.call.args, {**case.call.kwargs, "attention_mask": {"kind": "packed"}})
    with pytest.raises(NoAttentionMaps, match="kind dict"):
        attention_maps(case.reference, hidden, odd)
    assert case.reference.self_attn.config._attn_implementation == "sdpa"


def test_an_eager_pass_that_fails_is_a_note_not_an_end(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(llama)
    attention, forward = case.reference.self_attn, case.reference.self_attn.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        if attention.config._attn_implementation == "eager":
            raise TypeError("not\nmade for this")
        return forward(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", fails)
    record = case.measure()
    assert record.attention_divergence is None
    assert record.notes == ["attention maps: not compared, eager attention fails (not made for this)"]
    assert attention.config._attn_implementation == "sdpa"
