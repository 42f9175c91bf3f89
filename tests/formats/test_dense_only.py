"""A baseline's dense weight in a packed folder: the same bits again, and nothing that could deploy it."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import CountedSolution, DenseOnlyLinear
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.hub.bits import how_counted, true_bits
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.blocks import replace_module


@dataclass
class Thirds(CountedSolution):
    """A weight in steps of a third, 3 bits each."""

    W: Tensor

    def dense(self) -> Tensor:
        return self.W / 3

    def rounded(self) -> "Thirds":
        return Thirds(self.W.half().float())

    def stored_bits(self) -> int:
        return 3 * self.W.numel()


def layer(N: int, K: int, *, bias: bool = False) -> DenseOnlyLinear:
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
    return Thirds(W).pack(torch.arange(N).float() if bias else None)


@pytest.mark.parametrize("bias", [False, True])
def test_the_dense_weight_is_kept_as_it_is(bias: bool) -> None:
    made = layer(5, 7, bias=bias)
    assert torch.equal(made.dequantize(), Thirds(made.weight * 3).dense())
    x = torch.randn(2, 3, 7)
    expected = nn.functional.linear(x, made.weight, torch.arange(5).float() if bias else None)
    assert torch.equal(made(x), expected)
    assert made(x.double()).dtype == torch.float64
    assert made.true_bits() == 3
    again = empty_layer(nn.Linear(7, 5, bias), json.loads(json.dumps(describe_layer(made))))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))
    assert again.stored_bits() == made.stored_bits() == 105


def test_what_a_baseline_cannot_do_is_one_line() -> None:
    made = layer(5, 7)
    for call, word in ((lambda: made.latent(True), "tuned"), (made.operands, "exported"), (made.solution, "taken")):
        with pytest.raises(LitBinqError, match=f"dense_only cannot be {word}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_packed_folder_reloads_to_the_same_bits(tokenizer, tmp_path) -> None:
    model = tiny_model("llama")
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            replace_module(model.model.layers, name, layer(*linear.weight.shape))
    save_packed(model, tokenizer, tmp_path / "packed", facts={})
    loaded, _ = load_packed(tmp_path / "packed")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert true_bits(loaded) == 3
    assert how_counted(loaded) == " (counted, not stored)"
