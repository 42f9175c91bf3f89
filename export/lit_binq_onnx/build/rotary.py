"""Rotary embeddings whose angles depend on how long the text is, in a form that can be traced; see
`lit_binq.models.rotary` for the kinds.

transformers asks for the largest position of a pass and then changes its module in place, in some versions by a branch
on a value, which cannot be traced. `traceable_rotary` puts the same choice into the graph, without a memory of earlier
texts: the angles of a pass depend on its positions only. Keys that are in the cache keep the angles they got.

Knows transformers' rotary modules; nothing of ONNX.

Legend: b batch, s new tokens, n the largest position of a pass and one: the length of its longest text so far.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lit_binq.models.rotary import DEPENDENT, angle_kinds, dependent_modules


class _View:
    """A module's attributes, some of them replaced: what its own `forward` is called with."""

    def __init__(self, module: nn.Module, replaced: dict[str, Tensor]) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class LengthRotary(nn.Module):
    """A rotary module of transformers with its choice of frequencies written out.

    Args:
        module: one of `dependent_modules`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # no submodule: its buffers are not this model's
        # decorated by torch.no_grad and by what changes the module
        self._forward = inspect.unwrap(type(module).forward)

    def _frequencies(self, kind: str, layer_type: str | None, longest: Tensor) -> Tensor:
        """(d / 2,) for a pass with n = longest."""
        module: Any = self.__dict__["module"]
        prefix = "" if layer_type is None else f"{layer_type}_"
        first = getattr(module, f"{prefix}original_inv_freq")
        options = {} if layer_type is None else {"layer_type": layer_type}
        make: Any = ROPE_INIT_FUNCTIONS[kind]
        if kind == "longrope":
            parameters = module.config.rope_parameters
            limit = (parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"]
            other, _ = make(module.config, first.device, seq_len=limit + 1, **options)
        else:
            limit = module.original_max_seq_len
            other, _ = make(module.config, first.device, seq_len=longest, **options)
        return torch.where(longest > limit, other, first)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (b, s, d) each, as the module makes them for a text it sees first."""
        module: Any = self.__dict__["module"]
        kind = angle_kinds(module)[layer_type]
        options = {} if layer_type is None else {"layer_type": layer_type}
        replaced = {}
        if kind in DEPENDENT:
            name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
            replaced[name] = self._frequencies(kind, layer_type, position_ids.max() + 1)
        cos, sin = self._forward(_View(module, replaced), x, position_ids, **options)
        return cos, sin


@contextmanager
def traceable_rotary(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, angles that depend on n are chosen by tensors only, and by the pass only."""
    found = dependent_modules(model)
    try:
        for name, module in found.items():
            model.set_submodule(name, LengthRotary(module))
        yield
    finally:
        for name, module in found.items():
            model.set_submodule(name, module)
