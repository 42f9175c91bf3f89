"""What the trainable layers of all formats share: latent codes and their straight-through sign.

Legend: v latent codes, any shape; their signs are the stored codes B.

The forward pass always uses the signs. Backward, the signs pass the gradient on unchanged (straight-through).
Latents start at |T| o B / mean |T|: their size says how surely a code is what it is, and one learning rate
serves every layer and every format.
"""

import torch
from torch import Tensor, nn


class _Sign(torch.autograd.Function):
    """sign(v) with sign(0) = +1, and the identity as its gradient."""

    @staticmethod
    def forward(ctx: object, v: Tensor) -> Tensor:
        return signs(v)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def straight_through(v: Tensor) -> Tensor:
    """Signs of v, whose gradient passes on to v as it is."""
    return _Sign.apply(v)


def signs(v: Tensor) -> Tensor:
    """-1 or +1 by element, +1 for 0, in v's dtype."""
    return torch.where(v >= 0, 1.0, -1.0).to(v.dtype)


def latent_codes(B: Tensor, train: bool, target: Tensor | None = None) -> nn.Parameter:
    """Latents for codes B.

    Args:
        B: signs, any shape.
        train: whether they may change.
        target: what the codes were made from, of B's shape; None, or all zeros, gives every latent the size 1.
    """
    v = B.detach().float().clone()
    if train and target is not None:
        size = target.detach().float().abs()
        mean = size.mean()
        if mean > 0:
            v = v * (size / mean).clamp_min(1e-6)
    return nn.Parameter(v, requires_grad=train)
