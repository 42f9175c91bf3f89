"""The low-rank format, double binary factorization: W^ = diag(u) A diag(v) B diag(w), any budget from 0.1 to 2 bits.

Legend: N rows, K columns, k rank; A (N, k), B (k, K) signs in {-1, +1}; u (N,), v (k,), w (K,) scales.
True bits: k (N + K) / (N K) for the codes and 16 (N + k + K) / (N K) for the scales; ranks are multiples of 8, so
that a row of A is whole bytes.

The layer is two row x column products: B with column scales w and row scales v, then A with row scales u. Its column
scales are one by definition: they follow from the rank and are not stored.

Source: Boza and Macko, Addition is almost all you need: compressing neural networks with double binary factorization
(arXiv 2505.11076).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

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
from lit_binq.formats.operators import Product
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.row_column import LatentBinaryLinear, RowColumn


def stored_bits(N: int, K: int, k: int) -> int:
    """Bits of all stored tensors of an N x K weight of rank k."""
    return 8 * (N * packed_width(k) + k * packed_width(K)) + 16 * (N + k + K)


@dataclass
class LowRank(Solution):
    """An unpacked low-rank weight.

    Attributes:
        u: (N,) row scales, float.
        A: (N, k) signs, -1 or +1, float.
        v: (k,) scales in between, float.
        B: (k, K) signs, float.
        w: (K,) column scales, float.
    """

    u: Tensor
    A: Tensor
    v: Tensor
    B: Tensor
    w: Tensor

    def dense(self) -> Tensor:
        """(N, K)."""
        return ((self.u[:, None] * self.A) * self.v) @ (self.B * self.w)

    def pack(self, bias: Tensor | None = None) -> "LowRankLinear":
        """The layer that stores it; bias (N,) or None."""
        return LowRankLinear.from_solution(self, bias)

    def balanced(self) -> "LowRank":
        """The same weight with scales >= 0 and the geometric means of u, v and w alike, so that all fit float16.

        A negative scale moves its sign into the codes. Zero scales stay zero and count in no mean.
        """
        A = self.A * torch.where(self.u < 0, -1.0, 1.0)[:, None] * torch.where(self.v < 0, -1.0, 1.0)
        B = self.B * torch.where(self.w < 0, -1.0, 1.0)
        scales = [t.abs() for t in (self.u, self.v, self.w)]
        sizes = [t[t > 0].log2() for t in scales]
        if all(map(len, sizes)):
            means = torch.stack([t.mean() for t in sizes])
            shift = torch.round(means.mean() - means)
            # Powers of two that cancel: whatever rounding leaves over goes to the scales in between.
            shift[1] = -shift[0] - shift[2]
            scales = [t * torch.exp2(e) for t, e in zip(scales, shift, strict=True)]
        return LowRank(scales[0], A, scales[1], B, scales[2])


@register
class LowRankLinear(PackedLinear):
    """A linear layer stored as two factors of sign bits and three float16 scale vectors.

    Buffers:
        left_codes: (N, k / 8) uint8, A.
        right_codes: (k, ceil(K / 8)) uint8, B.
        left_scale: (N,) float16, u.
        inner_scale: (k,) float16, v.
        right_scale: (K,) float16, w.
        bias: (N,) float, or None.

    Its one option is `rank`, k; ValueError unless that is a positive multiple of 8. `ones` (k,), the column scales of
    the second product, are known without a file.
    """

    kind: ClassVar[str] = "low_rank"
    left_codes: Tensor
    right_codes: Tensor
    left_scale: Tensor
    inner_scale: Tensor
    right_scale: Tensor
    ones: Tensor
    rank: int

    @classmethod
    def tensors(cls, N: int, K: int, rank: int) -> dict[str, Buffer]:  # type: ignore[override]
        """The buffers; see the base class."""
        if rank < 8 or rank % 8:
            raise ValueError(f"rank {rank}, expected a multiple of 8")
        return {
            "left_codes": code_buffer(N, rank),
            "right_codes": code_buffer(rank, K),
            "left_scale": half_buffer(N),
            "inner_scale": half_buffer(rank),
            "right_scale": half_buffer(K),
        }

    @classmethod
    def derived(cls, N: int, K: int, rank: int) -> dict[str, Tensor]:  # type: ignore[override]
        """The ones."""
        return {"ones": torch.ones(rank, dtype=torch.float16)}

    @classmethod
    def from_solution(cls, solution: LowRank, bias: Tensor | None = None) -> "LowRankLinear":
        """Pack a solver's result; bias (N,) or None. Raises LitBinqError where a scale does not fit float16."""
        s = solution.balanced()
        tensors = {
            "left_codes": pack_signs(s.A),
            "right_codes": pack_signs(s.B),
            "left_scale": half_scales(s.u, "left_scale"),
            "inner_scale": half_scales(s.v, "inner_scale"),
            "right_scale": half_scales(s.w, "right_scale"),
        }
        return cls._holding(len(s.w), len(s.u), bias, tensors, rank=len(s.v))

    def solution(self) -> LowRank:
        """The stored weight, unpacked to float32."""
        A, B = unpack_signs(self.left_codes, self.rank), unpack_signs(self.right_codes, self.in_features)
        return LowRank(self.left_scale.float(), A, self.inner_scale.float(), B, self.right_scale.float())

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentLowRankLinear":
        """The trainable layer; see the base class."""
        return LatentLowRankLinear(self.solution(), self.bias, train_codes, target)

    def products(self) -> list[Product]:
        """Two products, the second of what the first gives."""
        right = [self.right_codes, self.inner_scale, self.right_scale]
        left = [self.left_codes, self.left_scale, self.ones]
        return [
            Product("BinaryMatMul", right, {"in_features": self.in_features}),
            Product("BinaryMatMul", left, {"in_features": self.rank}, self.bias, chained=True),
        ]


class LatentLowRankLinear(LatentLinear):
    """The trainable layer: both factors learn.

    Args:
        solution: both factors and their scales.
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K), sets the size of the latents: a factor's own target is what the other factor, kept as it is,
            would need to reach T in the least-squares sense.
    """

    def __init__(self, solution: LowRank, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        s = solution
        self.out_features, self.in_features, self.train_codes = len(s.u), len(s.w), train_codes
        left = right = None
        if train_codes and target is not None:
            left = _least_squares(((s.v[:, None] * s.B) * s.w).T, target.T).T
            right = _least_squares((s.u[:, None] * s.A) * s.v, target)
        self.right = LatentBinaryLinear(RowColumn(s.v, s.w, s.B), None, train_codes, right)
        self.left = LatentBinaryLinear(RowColumn(s.u, torch.ones_like(s.v), s.A), None, train_codes, left)
        self.left.c.requires_grad_(False)  # one by definition, and in `scale_parameters` no more
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents of both factors, or nothing."""
        return self.left.code_parameters() + self.right.code_parameters()

    def scale_parameters(self) -> list[nn.Parameter]:
        """u, v and w."""
        return [self.left.r, self.right.r, self.right.c]

    def solution(self) -> LowRank:
        """The current weight."""
        left, right = self.left.solution(), self.right.solution()
        return LowRank(left.r, left.B, left.c * right.r, right.B, right.c)

    def pack(self) -> LowRankLinear:
        """The current weight, packed."""
        return LowRankLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias


def _least_squares(M: Tensor, Y: Tensor) -> Tensor:
    """X (k, m) that minimises |M X - Y| with a slight pull to zero; M (n, k), Y (n, m)."""
    gram = (M.T @ M).double()
    gram.diagonal().add_(1e-3 * gram.diagonal().mean().clamp_min(1e-30))
    return torch.linalg.solve(gram, (M.T @ Y).double()).to(Y.dtype)
