"""The row x column format: W^ = diag(r) B diag(c), one bit a weight and one scale a row and a column.

Legend: N output rows, K input columns; r (N,) row scales, c (K,) column scales, B (N, K) signs in {-1, +1}.
True bits: 1 + 16 (N + K) / (N K), plus the padding of a row to whole bytes.
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
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.operators import Product, operator
from lit_binq.formats.packing import kept, pack_signs, unpack_signs


@dataclass
class RowColumn(Solution):
    """An unpacked row x column weight: what a solver returns.

    Attributes:
        r: (N,) row scales, float.
        c: (K,) column scales, float.
        B: (N, K) signs, -1 or +1, float.
    """

    r: Tensor
    c: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """(N, K): diag(r) B diag(c)."""
        return self.r[:, None] * self.B * self.c[None, :]

    def pack(self, bias: Tensor | None = None) -> "BinaryLinear":
        """The layer that stores it; bias (N,) or None."""
        return BinaryLinear.from_solution(self, bias)

    def balanced(self) -> "RowColumn":
        """The same weight with r >= 0, c >= 0 and equal geometric means, so that both fit float16.

        A negative scale moves its sign into the codes. Zero scales stay zero and count in no mean.
        """
        B = self.B * torch.where(self.r < 0, -1.0, 1.0)[:, None] * torch.where(self.c < 0, -1.0, 1.0)[None, :]
        r, c = self.r.abs(), self.c.abs()
        sizes = [t[t > 0].log2() for t in (r, c)]
        if not all(map(len, sizes)):  # the weight is zero
            return RowColumn(r, c, B)
        shift = torch.exp2(torch.round((sizes[1].mean() - sizes[0].mean()) / 2))
        return RowColumn(r * shift, c / shift, B)


@operator("BinaryMatMul", codes=torch.uint8, row_scale=torch.float16, col_scale=torch.float16)
def binary_matmul(
    x: Tensor, codes: Tensor, row_scale: Tensor, col_scale: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """y = ((x * c) B^T) * r + bias, in x's dtype.

    Args:
        x: (..., K) float.
        codes: (N, ceil(K / 8)) uint8, see `lit_binq.formats.packing`.
        row_scale: (N,) float16.
        col_scale: (K,) float16.
        bias: (N,) float or None.
        in_features: K.

    Returns:
        (..., N), dtype of x.
    """
    B = kept(codes, f"signs {x.dtype}", lambda: unpack_signs(codes, in_features, x.dtype))
    y = torch.nn.functional.linear(x * col_scale.to(x.dtype), B) * row_scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


@register
class BinaryLinear(PackedLinear):
    """A linear layer stored as sign bits and float16 scales.

    Buffers:
        codes: (N, ceil(K / 8)) uint8.
        row_scale: (N,) float16.
        col_scale: (K,) float16.
        bias: (N,) float, or None.

    """

    kind: ClassVar[str] = "row_column"
    codes: Tensor
    row_scale: Tensor
    col_scale: Tensor

    @classmethod
    def tensors(cls, N: int, K: int) -> dict[str, Buffer]:  # type: ignore[override]
        """The buffers; see the base class."""
        return {"codes": code_buffer(N, K), "row_scale": half_buffer(N), "col_scale": half_buffer(K)}

    @classmethod
    def from_solution(cls, solution: RowColumn, bias: Tensor | None = None) -> "BinaryLinear":
        """Pack a solver's result.

        Args:
            solution: r (N,), c (K,), B (N, K).
            bias: (N,) or None.

        Raises:
            LitBinqError: a scale is not finite, or too large for float16.
        """
        s = solution.balanced()
        tensors = {
            "codes": pack_signs(s.B),
            "row_scale": half_scales(s.r, "row_scale"),
            "col_scale": half_scales(s.c, "col_scale"),
        }
        return cls._holding(s.B.shape[1], s.B.shape[0], bias, tensors)

    def solution(self) -> RowColumn:
        """The stored weight, unpacked to float32."""
        return RowColumn(self.row_scale.float(), self.col_scale.float(), unpack_signs(self.codes, self.in_features))

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentBinaryLinear":
        """The trainable layer; see the base class."""
        return LatentBinaryLinear(self.solution(), self.bias, train_codes, target)

    def products(self) -> list[Product]:
        """One product."""
        stored = [self.codes, self.row_scale, self.col_scale]
        return [Product("BinaryMatMul", stored, {"in_features": self.in_features}, self.bias)]


class LatentBinaryLinear(LatentLinear):
    """The trainable layer: W^ = diag(r) sign(v) diag(c).

    Args:
        solution: r (N,), c (K,), B (N, K).
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K), sets the size of the latents; see `lit_binq.formats.latent`.
    """

    def __init__(
        self, solution: RowColumn, bias: Tensor | None, train_codes: bool, target: Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = solution.B.shape
        self.v = latent_codes(solution.B, train_codes, target)
        self.train_codes = train_codes
        self.r = nn.Parameter(solution.r.detach().float().clone())
        self.c = nn.Parameter(solution.c.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """r and c."""
        return [self.r, self.c]

    def solution(self) -> RowColumn:
        """The current weight."""
        return RowColumn(self.r.detach(), self.c.detach(), signs(self.v.detach()))

    def pack(self) -> BinaryLinear:
        """The current weight, packed."""
        return BinaryLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        # With frozen codes, scaling x and y instead of the weight spares the weight's gradient, a third of backward.
        if self.train_codes:
            weight = straight_through(self.v) * self.r[:, None] * self.c[None, :]
            return nn.functional.linear(x, weight, self.bias)
        y = nn.functional.linear(x * self.c, self.v) * self.r
        return y if self.bias is None else y + self.bias
