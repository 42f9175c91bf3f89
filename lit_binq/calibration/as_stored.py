"""A module for a while as it will be stored and run: what held-out scores are taken of."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear
from lit_binq.formats.unquantized import rest_tensors
from lit_binq.models.blocks import find_layers, replace_module


@contextmanager
def as_stored(module: nn.Module, unquantized_dtype: torch.dtype) -> Iterator[None]:
    """Inside, latents are packed layers and everything else is rounded; afterwards all is as it was, bit for bit.

    Args:
        module: a block, or the student.
        unquantized_dtype: what the rest is stored in, see lit_binq.formats.unquantized.

    Raises:
        LitBinqError: a scale that float16 cannot hold.
    """
    latents = find_layers(module, LatentLinear)
    packed = {name: layer.pack() for name, layer in latents.items()}
    exact: list[tuple[Tensor, Tensor]] = []
    try:
        for name, layer in packed.items():
            replace_module(module, name, layer)
        for *_, tensor in rest_tensors(module):
            rounded = tensor.detach().to(unquantized_dtype).to(tensor.dtype)
            if not torch.equal(rounded, tensor):
                exact.append((tensor, tensor.detach().clone()))
                tensor.detach().copy_(rounded)
        yield
    finally:
        for tensor, value in exact:
            tensor.detach().copy_(value)
        for name, latent in latents.items():
            replace_module(module, name, latent)


@torch.no_grad()
def score_as_stored(
    module: nn.Module, unquantized_dtype: torch.dtype, device: torch.device, sums: Callable[[], Tensor]
) -> Tensor:
    """What `sums` gives of the module as it will be stored, in float32 whatever precision its steps run in.

    Steps may run under autocast, whose rounding is as large as what two epochs differ by; what is kept is evaluated and
    exported in float32.

    Args:
        module: a block, or the student.
        unquantized_dtype: what the rest is stored in.
        device: where it runs.
        sums: gives (2,) float64, summed loss and its weight.

    Returns:
        (2,) float64: (inf, 1) if it cannot be stored.
    """
    try:
        with torch.autocast(device.type, enabled=False), as_stored(module, unquantized_dtype):
            return sums()
    except LitBinqError:
        return torch.tensor((math.inf, 1.0), dtype=torch.float64, device=device)
