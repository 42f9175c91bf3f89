"""The trainable layer of the two-plane layer.

Legend: N rows, K columns in stored order, g columns a group, G groups; v (N, K) latents, levels (N, G, L) as in
lit_binq.formats.two_plane.solution, l_0 <= .. <= l_3 their four levels in order.

    rank of a weight's level = number of thresholds -1, 0, 1 that v has reached;   A = v >= 0, B by 2 (v - sign v) >= 0

One latent for both bits, so that a weight that is pushed passes the four levels in their order: between the two middle
levels both bits change, and with a latent for each a push that turns A would hold B where it is, which overshoots to
the outer level. Backward, dL/dv = dL/dW (l_3 - l_0) / 3: straight-through, times the weight that one step of v, from
threshold to threshold, is on the average.

Levels are kept as multiples of a power of two, the size of their group. So one learning rate moves the levels of large
and of small groups by the same share of their size, and one near zero, a mean say, moves like the others of its group
rather than not at all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_binq.formats.activations import plain_scales, quantize
from lit_binq.formats.base import LatentLinear, PackedLinear
from lit_binq.formats.latent import signs
from lit_binq.formats.two_plane.solution import (
    RANK,
    InputFormat,
    TwoPlane,
    by_code,
    four_levels,
    stored_order,
    swapped,
)

EDGE, REACH = 0.05, 2.0
"""Least distance of a starting latent from a threshold, and most beyond the outer ones."""


class LatentTwoPlaneLinear(LatentLinear):
    """The trainable layer; groups, outliers and static ranges stay.

    Trained are the latents, the levels and, where the input has four bits and its scales zeta and rho are not the
    plain ones, those too. The forward pass sees the quantized input.

    Args:
        solution: the start; its codes say the rank of each level, see `TwoPlane.canonical`.
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K) dense weight the codes were made from, columns in the input's order: it sets where between its
            thresholds a latent begins, as far as the codes allow; None begins half-way.
    """

    base: Tensor
    order: Tensor
    inverse: Tensor
    input_range: Tensor
    plain: Tensor

    def __init__(
        self, solution: TwoPlane, bias: Tensor | None, train_codes: bool, target: Tensor | None = None
    ) -> None:
        super().__init__()
        s = solution.canonical()
        self.out_features, self.in_features = s.codes.shape
        self.group, self.train_codes = s.group, train_codes
        self.activation_bits, self.outliers = s.inputs.activation_bits, len(s.inputs.outliers)
        device, outliers = s.codes.device, s.inputs.outliers
        self.register_buffer("order", stored_order(outliers.to(device), self.in_features))
        self.register_buffer("inverse", self.order.argsort())
        stored_target = None if target is None or not train_codes else target.detach().float()[:, self.order]
        self.v = nn.Parameter(starting_latents(s, stored_target), requires_grad=train_codes)
        levels = s.levels.detach().float()
        self.register_buffer("base", _sizes(levels))
        self.levels = nn.Parameter(levels / self.base)
        empty = torch.empty(0, device=device)
        # Plain INT4 is a choice: only fitted scales are trained.
        scales = s.inputs.scales if self.activation_bits == 4 else None
        self.input_scales = None if scales is None else nn.Parameter(scales.detach().float().to(device).clone())
        plain = plain_scales().half().float().to(device) if self.activation_bits == 4 else empty
        static = s.inputs.range
        self.register_buffer("input_range", empty if static is None else static.detach().float().to(device).clone())
        self.register_buffer("plain", plain)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """Levels over the size of their group; of 4-bit inputs zeta and rho, unless they are plain."""
        return [self.levels] if self.input_scales is None else [self.levels, self.input_scales]

    def inputs(self) -> InputFormat:
        """How the input is quantized at present."""
        scales = None if self.input_scales is None else self.input_scales.detach().clone()
        static = self.input_range.clone() if len(self.input_range) else None
        return InputFormat(self.activation_bits, self.order[: self.outliers].clone(), scales, static)

    def solution(self) -> TwoPlane:
        """The current weight."""
        return TwoPlane(self.levels.detach() * self.base, codes_of(self.v.detach()), self.group, self.inputs())

    def pack(self) -> PackedLinear:
        """The current weight, packed."""
        return self.solution().pack(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.outliers:
            x = _Permute.apply(x, self.order, self.inverse)
        scales = self.plain if self.input_scales is None else self.input_scales
        x = quantize(x, bits=self.activation_bits, outliers=self.outliers, scales=scales, input_range=self.input_range)
        weight = _Assemble.apply(self.v, four_levels(self.levels * self.base), self.group)
        return nn.functional.linear(x, weight, self.bias)


def codes_of(v: Tensor) -> Tensor:
    """A + 2 B (uint8) of latents, any shape."""
    upper = signs(v)
    return (upper > 0).byte() + 2 * (v - upper >= 0).byte()


def starting_latents(s: TwoPlane, target: Tensor | None) -> Tensor:
    """Latents (N, K) that stand for the codes of a canonical solution; target (N, K) in stored order."""
    rank = swapped(s.codes.long())
    middle = rank - 1.5
    if target is None:
        return middle.float()
    levels = four_levels(s.levels.detach().float())[..., RANK]
    bounds = (levels[..., 1:] + levels[..., :-1]) / 2  # between neighbours: the thresholds -1, 0, 1 of v
    spacing = ((levels[..., 3:] - levels[..., :1]) / 3).clamp_min(1e-30)
    lower = torch.cat((bounds[..., :1] - spacing, bounds), -1)
    upper = torch.cat((bounds, bounds[..., 2:] + spacing), -1)
    low, high = (by_code(edge, rank, s.group) for edge in (lower, upper))
    along = ((target - low) / (high - low).clamp_min(1e-30)).clamp(1 - REACH, REACH)
    # Where the codes are not those of the nearest level the target says nothing about how sure they are.
    along = torch.where(rank > 0, along.clamp_min(EDGE), along)
    along = torch.where(rank < 3, along.clamp_max(1 - EDGE), along)
    return middle - 0.5 + along


def _sizes(levels: Tensor) -> Tensor:
    """(N, G, 1) powers of two about the mean size of each group's levels, so that nothing is rounded.

    Groups of zeros take the size of all.
    """
    size = levels.abs().mean(-1, keepdim=True)
    mean = size.mean()
    size = torch.where(size > 0, size, torch.where(mean > 0, mean, torch.ones_like(mean)))
    return torch.exp2(torch.round(torch.log2(size)))


class _Permute(torch.autograd.Function):
    """x (..., K) with its columns in another order; backward the same way back, without sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(-1, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(-1, inverse), None, None


class _Assemble(torch.autograd.Function):
    """The weight (N, K) of latents v (N, K) and four levels (N, G, 4) by code; see the head of this file.

    Keeps one byte a weight for its backward pass, whose sums over groups have a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, levels: Tensor, group: int) -> Tensor:
        codes = codes_of(v)
        ctx.save_for_backward(codes, levels)
        ctx.group = group
        return by_code(levels, codes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, levels = ctx.saved_tensors
        K, g = codes.shape[1], ctx.group
        grad = nn.functional.pad(grads[0], (0, -K % g)).unflatten(1, (-1, g))  # (N, G, g)
        to_v = to_levels = None
        if ctx.needs_input_grad[0]:
            step = (levels[..., 3:] - levels[..., :1]) / 3
            to_v = (grad * step).flatten(1)[:, :K]
        if ctx.needs_input_grad[1]:
            code = nn.functional.pad(codes, (0, -K % g)).unflatten(1, (-1, g))
            to_levels = torch.stack([torch.where(code == c, grad, 0.0).sum(-1) for c in range(4)], -1)
        return to_v, to_levels, None
