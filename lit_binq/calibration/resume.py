"""The student in a checkpoint: packed blocks as they are stored, and what the model stage may change outside them.

Between stages nothing is being optimized, so a checkpoint taken there needs neither latents nor optimizer moments. Both
streams are computed again on resume by running the packed blocks, which gives the same bits.
"""

from typing import Any

import torch
from torch import nn

from lit_binq.calibration.workspace import Workspace
from lit_binq.formats import PackedLinear
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.models.blocks import find_layers, replace_module


def student_state(work: Workspace, done: int, *, matrices: bool) -> dict[str, Any]:
    """The student's first `done` blocks, packed, and its parameters outside all blocks.

    Args:
        work: the workspace.
        done: how many blocks are packed.
        matrices: keep embeddings and head too, because the model stage tunes them.

    Returns:
        `blocks`: {number: state}, `formats`: {number: {layer: entry of `describe_layer`}}, `non_block`: {name: tensor}.
    """
    return {
        "blocks": {i: work.blocks[i].state_dict() for i in range(done)},
        "formats": {
            i: {name: describe_layer(m) for name, m in find_layers(work.blocks[i], PackedLinear).items()}
            for i in range(done)
        },
        "non_block": {name: p.detach().clone() for name, p in _non_block(work, matrices).items()},
    }


@torch.no_grad()
def restore_student(work: Workspace, state: dict[str, Any], *, matrices: bool) -> None:
    """Put what `student_state` returned in place and advance both streams past the packed blocks, unless all are.

    Args:
        work: a fresh workspace of the same model, its streams standing at the first block.
        state: what `student_state` returned.
        matrices: as then.
    """
    whole = len(state["blocks"]) == len(work.blocks)  # what is left needs no streams
    for i, saved in state["blocks"].items():
        block = work.new_block(i)
        for name, entry in state["formats"][i].items():
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            replace_module(block, name, empty_layer(linear, entry))
        block.load_state_dict(saved)
        for layer in find_layers(block, PackedLinear).values():
            layer.refresh()
        work.blocks[i] = block
        if not whole:
            work.skip(i)
    for name, p in _non_block(work, matrices).items():
        p.copy_(state["non_block"][name])


def _non_block(work: Workspace, matrices: bool) -> dict[str, nn.Parameter]:
    return {**work.non_block_norms(), **(work.non_block_matrices() if matrices else {})}
