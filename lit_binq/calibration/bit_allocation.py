"""A bit budget: how many true bits each linear layer of the model may take, before the first block is quantized.

Legend: x (K,) a layer's input in the full-precision model, m_j = E[x_j^2] its moments.

What is known then are the weights and the full-precision inputs; the solver says where bits gain most
(Solver.allocate_bits).
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_binq.calibration.workspace import Workspace
from lit_binq.models.blocks import linear_groups, run_block
from lit_binq.solvers import Solver

WINDOWS = 8
"""Windows of each rank that the moments are taken from: a mean of squares needs few."""


@torch.no_grad()
def plan(work: Workspace, solver: Solver, bits: float) -> dict[str, float]:
    """True bits for every linear layer of every block, by "block.linear".

    Args:
        work: the workspace, its streams standing at the first block.
        solver: its `allocate_bits` decides.
        bits: true bits a weight, over all layers.

    Raises:
        LitBinqError: the format does not fit into the budget.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    hidden = work.streams.x[:WINDOWS].to(work.device, copy=True)
    for i, block in enumerate(work.teacher_blocks):
        block.to(work.device)
        names = [name for group in linear_groups(block, hidden[:1], work.calls[i]) for name in group]
        with ExitStack() as stack:
            for name in names:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                key = f"{i}.{name}"
                moments[key] = torch.zeros(linear.in_features, dtype=torch.float64, device=work.device)
                stack.callback(linear.register_forward_pre_hook(_adder(moments[key])).remove)
            for w in range(len(hidden)):
                hidden[w : w + 1] = run_block(block, hidden[w : w + 1], work.calls[i])
        block.to(work.home)
        for name in names:  # where they rest: the plan needs no room on the device for a whole model
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weights[f"{i}.{name}"] = linear.weight.detach()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for moment in moments.values():
            torch.distributed.all_reduce(moment)
    return solver.allocate_bits(weights, moments, bits)


def _adder(total: Tensor) -> Any:
    """A forward hook that adds the squares of a layer's input to `total` (K,)."""

    def add(_: nn.Module, args: tuple[Any, ...]) -> None:
        total.add_(args[0].flatten(0, -2).double().square().sum(0))

    return add
