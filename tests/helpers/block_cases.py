"""A block, its quantized other and both streams, for tests of what is measured of them."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.diagnostics.measure import measure_block
from lit_binq.formats import BinaryLinear, RowColumn
from lit_binq.models.blocks import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    linear_groups,
    replace_module,
    run_block,
)
from lit_binq.utils.json_records import BlockMeasures

WINDOWS, LENGTH = 3, 10


@dataclasses.dataclass
class Case:
    """A block of a model, its quantized other, and both streams."""

    reference: nn.Module
    module: nn.Module
    x: Tensor
    x_tilde: Tensor
    call: BlockCall
    names: list[str]

    def measure(self, **options: Any) -> BlockMeasures:
        return measure_block(self.reference, self.module, self.x, self.x_tilde, self.call, self.names, **options)


def sign_weight(linear: nn.Linear) -> RowColumn:
    """diag(r) sign(W): r the rows' mean magnitude."""
    W = linear.weight.detach()
    return RowColumn(W.abs().mean(1), torch.ones(W.shape[1]), W.sign())


def make_case(model: PreTrainedModel, index: int = 1) -> Case:
    """Block `index`, quantized by signs; x~ is x with noise."""
    g = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 256, (WINDOWS, LENGTH), generator=g)
    blocks = find_blocks(model)
    model.requires_grad_(False)
    call = capture_calls(model, blocks, windows[:1])[index]
    x = embed(model, blocks, windows)
    for i in range(index):
        x = run_block(blocks[i], x, call)
    reference, module = blocks[index], copy.deepcopy(blocks[index])
    names = [name for group in linear_groups(reference, x[:1], call) for name in group]
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(module, name, BinaryLinear.from_solution(sign_weight(linear), linear.bias))
    return Case(reference, module, x, x + 0.1 * torch.randn(x.shape, generator=g), call, names)


def inputs_of(block: nn.Module, name: str, x: Tensor, call: BlockCall) -> Tensor:
    """(n, T, K) float64, caught on a pass of all windows at once."""
    caught: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    run_block(block, x, call)
    handle.remove()
    return caught[0].reshape(len(x), LENGTH, -1).double()
