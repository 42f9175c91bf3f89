"""The grouped format: a scale for each row and each group of g columns, W^_ij = s_{i, j // g} B_ij.

Legend: N rows, K columns, g columns a group (the last group may be shorter), G = ceil(K / g) groups;
s (N, G) scales, B (N, K) signs in {-1, +1}.
True bits: 1 + 16 / g, plus the padding of a row to whole bytes and of its last group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import (
    Buffer,
    LatentLinear,
    PackedLinear,
    Solution,
    code_buffer,
    half_buffer,
    half_scales,
    register,
)
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.operators import Product, operator
from lit_binq.formats.packing import pack_signs, unpack_signs

SMALLEST_GROUP, LARGEST_GROUP = 8, 1024


def group_count(K: int, group: int) -> int:
    """Groups of a row of K columns: ceil(K / g)."""
    return -(-K // group)


def check_group(group: int, option: str = "group") -> None:
    """Refuse a group size that no operator takes.

    Raises:
        LitBinqError: not a multiple of 8 from 8 to 1024.
    """
    if group % 8 or not SMALLEST_GROUP <= group <= LARGEST_GROUP:
        raise LitBinqError(
            f"{option}: got {group}, expected a multiple of 8 from {SMALLEST_GROUP} to {LARGEST_GROUP}: "
            "groups are whole bytes of signs"
        )


def spread(scales: Tensor, K: int, group: int) -> Tensor:
    """The scale of every weight: (N, G) -> (N, K)."""
    N, G = scales.shape
    return scales[:, :, None].expand(N, G, group).reshape(N, G * group)[:, :K]


@dataclass
class Grouped(Solution):
    """An unpacked grouped weight.

    Attributes:
        s: (N, G) scales, float.
        B: (N, K) signs, -1 or +1, float.
        group: g.
    """

    s: Tensor
    B: Tensor
    group: int

    def dense(self) -> Tensor:
        """(N, K)."""
        return spread(self.s, self.B.shape[1], self.group) * self.B

    def pack(self, bias: Tensor | None = None) -> "GroupedLinear":
        """The layer that stores it; bias (N,) or None."""
        return GroupedLinear.from_solution(self, bias)

    def positive(self) -> "Grouped":
        """The same weight with s >= 0: a negative scale moves its sign into the codes."""
        turn = spread(torch.where(self.s < 0, -1.0, 1.0), self.B.shape[1], self.group)
        return Grouped(self.s.abs(), self.B * turn.to(self.B.dtype), self.group)


@operator("GroupedBinaryMatMul", codes=torch.uint8, scales=torch.float16)
def grouped_binary_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, group: int
) -> Tensor:
    """y_n = sum_j s_{n, j // g} B_nj x_j + bias_n, in x's dtype.

    Args:
        x: (..., K) float.
        codes: (N, ceil(K / 8)) uint8, see `lit_binq.formats.packing`.
        scales: (N, ceil(K / g)) float16.
        bias: (N,) float or None.
        in_features: K.
        group: g, a multiple of 8.

    Returns:
        (..., N), dtype of x.
    """
    W = unpack_signs(codes, in_features, x.dtype) * spread(scales.to(x.dtype), in_features, group)
    return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


@register
class GroupedLinear(PackedLinear):
    """A linear layer stored as sign bits and one float16 scale a row and group.

    Buffers:
        codes: (N, ceil(K / 8)) uint8.
        scales: (N, G) float16.
        bias: (N,) float, or None.

    Its one option is `group`, g; LitBinqError unless that is a multiple of 8 from 8 to 1024.
    """

    kind: ClassVar[str] = "grouped"
    codes: Tensor
    scales: Tensor
    group: int

    @classmethod
    def tensors(cls, N: int, K: int, group: int) -> dict[str, Buffer]:  # type: ignore[override]
        """The buffers; see the base class."""
        check_group(group)
        return {"codes": code_buffer(N, K), "scales": half_buffer(N, group_count(K, group))}

    @classmethod
    def from_solution(cls, solution: Grouped, bias: Tensor | None = None) -> "GroupedLinear":
        """Pack a solver's result; bias (N,) or None.

        Raises:
            LitBinqError: a scale is not finite, or too large for float16.
        """
        s = solution.positive()
        N, K = s.B.shape
        tensors = {"codes": pack_signs(s.B), "scales": half_scales(s.s, "scales")}
        return cls._holding(K, N, bias, tensors, group=s.group)

    def solution(self) -> Grouped:
        """The stored weight, unpacked to float32."""
        return Grouped(self.scales.float(), unpack_signs(self.codes, self.in_features), self.group)

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentGroupedLinear":
        """The trainable layer; see the base class."""
        return LatentGroupedLinear(self.solution(), self.bias, train_codes, target)

    def products(self) -> list[Product]:
        """One product."""
        numbers = {"in_features": self.in_features, "group": self.group}
        return [Product("GroupedBinaryMatMul", [self.codes, self.scales], numbers, self.bias)]


class LatentGroupedLinear(LatentLinear):
    """The trainable layer: W^_ij = s_{i, j // g} sign(v_ij).

    Args:
        solution: s (N, G), B (N, K).
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K), sets the size of the latents; see `lit_binq.formats.latent`.
    """

    def __init__(self, solution: Grouped, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = solution.B.shape
        self.group, self.train_codes = solution.group, train_codes
        self.v = latent_codes(solution.B, train_codes, target)
        self.s = nn.Parameter(solution.s.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """s."""
        return [self.s]

    def solution(self) -> Grouped:
        """The current weight."""
        return Grouped(self.s.detach(), signs(self.v.detach()), self.group)

    def pack(self) -> GroupedLinear:
        """The current weight, packed."""
        return GroupedLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        B = straight_through(self.v) if self.train_codes else self.v
        return nn.functional.linear(x, B * spread(self.s, self.in_features, self.group), self.bias)
