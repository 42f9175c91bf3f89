"""Rounding of the rest, everything but packed weights, to the dtype that a packed folder stores it in.

A model computes with exactly what is stored, so it is rounded where it stands, once; rounding twice changes nothing.
float16 ends at 65504 and, downwards, at 6e-8, and neither may pass in silence: a network with norms does not care how
small its embeddings are, until they are zeros. What a tensor loses is measured row by row,

    |w - w^| <= 2^-8 max(|w|, s)        w a row, w^ the same rounded

where bfloat16 never loses more than 2^-9 |w|. So values that are tiny beside others of their row may vanish. s is the
size that a row has to be seen beside: of embeddings 2^-10 of the matrix's mean row, since each row is a token's whole
input and is scaled up by a norm, but rows of tokens that were never trained may be nothing beside the others; of other
matrices the mean row, since outputs are compared and added with each other; of a bias the rows of the weight before it,
and of the weight of a norm what it is multiplied by: there w is what the norm gives for inputs of size one.
"""

from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear

LOSS = 2.0**-8
"""Most that a row may lose, as a share of its size."""

UNTRAINED = 2.0**-10
"""Size of an embedding, as a share of the mean one, below which it says nothing."""


def rest_tensors(module: nn.Module, skip: Container[int] = ()) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every stored floating-point tensor outside packed weights: (name, module that holds it, its name there, tensor).

    A shared tensor comes once. A packed linear's bias belongs to the rest.

    Args:
        module: a model or a part of one.
        skip: ids of tensors to leave out.
    """
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        if isinstance(owner, PackedLinear):
            names = ["bias"]
        else:
            names = [*owner._parameters, *(n for n in owner._buffers if n not in owner._non_persistent_buffers_set)]
        for name in names:
            tensor = getattr(owner, name)
            if tensor is None or not tensor.is_floating_point() or id(tensor) in skip or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield (f"{prefix}.{name}" if prefix else name), owner, name, tensor


@torch.no_grad()
def require_holds(module: nn.Module, dtype: torch.dtype, skip: Container[int] = ()) -> None:
    """Make sure that `round_unquantized` neither overflows nor loses a row of any tensor.

    Args:
        module: a model or a part of one.
        dtype: float16, bfloat16 or float32.
        skip: ids of tensors to leave out.

    Raises:
        LitBinqError: names the first tensor that `dtype` cannot hold.
    """
    shown = str(dtype).removeprefix("torch.")
    for name, owner, leaf, tensor in rest_tensors(module, skip):
        if not tensor.numel():
            continue
        rows = tensor.detach().reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.detach().reshape(1, -1)
        low, high = rows.aminmax()
        if not torch.isfinite(torch.stack((low, high)).to(dtype)).all():
            raise LitBinqError(
                f"tensor {name} has values up to {float(tensor.abs().max()):g} that {shown} cannot hold; "
                "expected values that stay finite: set the option `unquantized_dtype` to bfloat16 or float32"
            )
        small = _small_rows(rows, dtype)
        if not len(small):
            continue
        exact = rows[small].double()
        sizes, losses = exact.norm(dim=1), (exact - exact.to(dtype).double()).norm(dim=1)
        if not (losses > LOSS * sizes).any():
            continue
        if tensor.dim() < 2:
            sizes, losses = _in_use(owner, leaf, tensor, dtype, sizes, losses)
        else:
            share = UNTRAINED if isinstance(owner, nn.Embedding) else 1.0
            sizes = sizes.maximum(share * rows.norm(dtype=torch.float64) / len(rows) ** 0.5)
        shares = (losses / sizes).nan_to_num(0)  # rows of zeros
        worst = int(shares.argmax())
        size, lost = float(exact[worst].square().mean().sqrt()), float(shares[worst])
        if lost > LOSS:
            raise LitBinqError(
                f"tensor {name} has values too small for {shown}: row {int(small[worst])}, of size "
                f"{size:.1e}, would lose {lost:.1%}, expected at most {LOSS:.1%}: set the option `unquantized_dtype` "
                "to bfloat16 or float32"
            )


def _small_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Indices of those rows (n, k) that may lose too much: others are too large for it, whatever is in them.

    Every value loses at most eps / 2 of its size or half of the step between the dtype's smallest numbers.
    """
    info = torch.finfo(dtype)
    most = info.smallest_normal * info.eps / 2 * rows.shape[1] ** 0.5
    return (rows.norm(dim=1) * (LOSS - info.eps) < most).nonzero()[:, 0]


def _in_use(
    owner: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype, size: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Size and loss (1,) of a vector in use: of a bias beside its weight, of a norm's weight in its output."""
    if isinstance(owner, PackedLinear):
        return (size.square() + owner.dequantize().double().square().sum()).sqrt(), loss
    weight = owner._parameters.get("weight")
    if leaf == "bias" and weight is not None and weight.dim() > 1:
        return (size.square() + weight.detach().double().square().sum()).sqrt(), loss
    vectors = {p.shape for p in owner._parameters.values() if p is not None}
    if not list(owner.children()) and len(vectors) == 1 and tensor.dim() == 1:
        x = torch.randn(8, len(tensor), generator=torch.Generator().manual_seed(0)).to(tensor.device, tensor.dtype)
        try:
            exact = owner(x)
            change = functional_call(owner, {leaf: tensor.to(dtype).to(tensor.dtype)}, (x,)) - exact
        except (TypeError, RuntimeError, ValueError, IndexError):  # no norm: it wants other inputs
            return size, loss
        if isinstance(exact, Tensor) and torch.isfinite(exact).all():
            return exact.double().norm()[None], change.double().norm()[None]
    return size, loss


@torch.no_grad()
def round_unquantized(module: nn.Module, dtype: torch.dtype = torch.float16, skip: Container[int] = ()) -> None:
    """Round the rest of a model or block to the dtype it is stored in, in place, held as contiguous float32.

    `module.stored_dtype` says from then on which dtype that is.

    Args:
        module: a model, or a block whose linears are packed.
        dtype: float16, bfloat16 or float32.
        skip: ids of tensors to leave alone.

    Raises:
        LitBinqError: a tensor does not fit `dtype` (`require_holds`); the module is then left as it was.
    """
    require_holds(module, dtype, skip)
    for _, owner, name, tensor in list(rest_tensors(module, skip)):
        # Shared parameters are one object, so they stay shared. Strides change how products are summed.
        rounded = tensor.detach().to(dtype).float().contiguous()
        if tensor.dtype == torch.float32 and tensor.is_contiguous():
            tensor.detach().copy_(rounded)
        elif isinstance(tensor, nn.Parameter):
            tensor.data = rounded
        else:
            setattr(owner, name, rounded)
    for owner in module.modules():  # what no file holds: it is made again as float32
        for name in () if isinstance(owner, PackedLinear) else owner._non_persistent_buffers_set:
            buffer = getattr(owner, name)
            if buffer is not None and buffer.is_floating_point() and id(buffer) not in skip:
                setattr(owner, name, buffer.float())
    module.stored_dtype = dtype  # type: ignore[assignment]  # a plain attribute


def stored_bits(module: nn.Module, tensor: Tensor) -> int:
    """Bits in a file of each value of a tensor outside packed weights: of `round_unquantized`'s dtype, if it ran."""
    dtype = getattr(module, "stored_dtype", None)
    return torch.finfo(dtype).bits if dtype is not None and tensor.is_floating_point() else tensor.element_size() * 8
