"""What the processes of a distributed run have in common: the first one's tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_binq.formats import PackedLinear


def several() -> bool:
    """Whether there is more than one process."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the first process's, in place, if there are others. Called on every rank."""
    if several():
        for tensor in tensors:
            if tensor.numel():
                torch.distributed.broadcast(tensor.detach(), 0)


def take_module_from_first(module: nn.Module) -> None:
    """The same of everything that a module stores. What packed layers derive from it is derived again."""
    if several():
        take_from_first(module.state_dict().values())
        for layer in module.modules():
            if isinstance(layer, PackedLinear):
                layer.refresh()
