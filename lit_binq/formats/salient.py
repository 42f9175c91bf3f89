"""The salient format: a row x column plane, and a second one on chosen columns.

Legend: N rows, K columns, k chosen columns, P (k, K) their 0/1 selection;
    W^ = diag(r) B diag(c) + diag(r2) B2 diag(c2) P          B (N, K), B2 (N, k) signs; r, r2 (N,), c (K,), c2 (k,)

On a chosen column a weight takes one of four values +-a +-b, elsewhere one of two. True bits: 1 + k/K for the codes,
16 (2N + K + k) / (N K) for the scales, and one bit a column (a bitmap of K bits) that says which are chosen. With
k = K there is no bitmap.

The layer is two row x column products: the second reads the chosen columns of the input only.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lit_binq.formats.base import LatentLinear, PackedLinear, Solution
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.row_column import BinaryLinear, RowColumn, binary_matmul


@dataclass
class Salient(Solution):
    """An unpacked salient weight.

    Attributes:
        base: the first plane, (N, K).
        extra: the second plane, (N, k).
        columns: (k,) int64, ascending: the chosen columns.
    """

    base: RowColumn
    extra: RowColumn
    columns: Tensor

    def dense(self) -> Tensor:
        """(N, K)."""
        return self.base.dense().index_add(1, self.columns, self.extra.dense())

    def pack(self, bias: Tensor | None = None) -> "SalientLinear":
        """The layer that stores it; bias (N,) or None."""
        return SalientLinear.from_solution(self, bias)


def stored_bits(N: int, K: int, k: int) -> int:
    """Bits of all stored tensors of an N x K weight with k chosen columns; k = 0 is the plain row x column format."""
    base = 8 * N * packed_width(K) + 16 * (N + K)
    if k == 0:
        return base
    return base + 8 * N * packed_width(k) + 16 * (N + k) + (8 * packed_width(K) if k < K else 0)


class SalientLinear(PackedLinear):
    """A linear layer stored as two planes of sign bits, their float16 scales and a bitmap of columns.

    Buffers:
        codes, row_scale, col_scale: the first plane, as in BinaryLinear.
        extra_codes: (N, ceil(k / 8)) uint8.
        extra_row_scale: (N,) float16.
        extra_col_scale: (k,) float16.
        column_bits: (ceil(K / 8),) uint8, least significant bit first; empty if k = K.
        bias: (N,) float, or None.

    Args:
        in_features: K.
        out_features: N.
        extra: k, from 1 to K.
        bias: whether a bias is stored.
        dtype: dtype of the bias.
    """

    kind: ClassVar[str] = "salient"
    codes: Tensor
    row_scale: Tensor
    col_scale: Tensor
    extra_codes: Tensor
    extra_row_scale: Tensor
    extra_col_scale: Tensor
    column_bits: Tensor
    columns: Tensor

    def __init__(
        self, in_features: int, out_features: int, extra: int, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.extra = in_features, out_features, extra
        width = packed_width(in_features) if extra < in_features else 0
        for name, plane in (("", in_features), ("extra_", extra)):
            for buffer, tensor in BinaryLinear(plane, out_features).weight_buffers().items():
                self.register_buffer(name + buffer, tensor)
        self.register_buffer("column_bits", torch.zeros(width, dtype=torch.uint8))
        # Follows from the bitmap, so it is not stored.
        self.register_buffer("columns", torch.arange(extra), persistent=False)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype = torch.float32, **layout: int
    ) -> Self:
        """Zeroed buffers; the layout is {"extra": k}."""
        return cls(in_features, out_features, layout["extra"], bias, dtype)

    def layout(self) -> dict[str, int]:
        """{"extra": k}."""
        return {"extra": self.extra}

    @classmethod
    def from_solution(cls, solution: Salient, bias: Tensor | None = None) -> "SalientLinear":
        """Pack a solver's result; bias (N,) or None. Raises LitBinqError where a scale does not fit float16."""
        N, K = solution.base.B.shape
        layer = cls(K, N, len(solution.columns), bias is not None, torch.float32 if bias is None else bias.dtype)
        for name, plane in (("", solution.base), ("extra_", solution.extra)):
            for buffer, tensor in BinaryLinear.from_solution(plane).weight_buffers().items():
                setattr(layer, name + buffer, tensor)
        if layer.extra < K:
            chosen = -torch.ones(1, K, device=solution.columns.device)
            chosen[0, solution.columns] = 1
            layer.column_bits = pack_signs(chosen)[0]
        layer.columns = solution.columns
        if bias is not None:
            layer.bias = bias.detach().clone()
        return layer

    def refresh(self) -> None:
        """Derive the chosen columns from the bitmap: after its buffers were filled.

        Raises:
            ValueError: the bitmap does not have k bits.
        """
        if self.extra < self.in_features:
            columns = unpack_signs(self.column_bits[None], self.in_features)[0].gt(0).nonzero()[:, 0]
            if len(columns) != self.extra:
                raise ValueError(f"column_bits marks {len(columns)} columns, expected {self.extra}")
            self.columns = columns

    def solution(self) -> Salient:
        """The stored weight, unpacked to float32."""
        base = RowColumn(self.row_scale.float(), self.col_scale.float(), unpack_signs(self.codes, self.in_features))
        signs = unpack_signs(self.extra_codes, self.extra)
        extra = RowColumn(self.extra_row_scale.float(), self.extra_col_scale.float(), signs)
        return Salient(base, extra, self.columns)

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        return self.solution().dense()

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentSalientLinear":
        """The trainable twin; see the base class."""
        return LatentSalientLinear(self.solution(), self.bias, train_codes, target)

    def weight_buffers(self) -> dict[str, Tensor]:
        """Both planes and the bitmap."""
        return {name: t for name, t in self.named_buffers() if name not in ("bias", "columns")}

    def operands(self) -> list[tuple[str, list[Tensor]]]:
        """Two products."""
        first = [self.codes, self.row_scale, self.col_scale]
        second = [self.extra_codes, self.extra_row_scale, self.extra_col_scale]
        return [
            ("BinaryMatMul", first if self.bias is None else [*first, self.bias.float()]),
            ("BinaryMatMul", second),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = binary_matmul(x, self.codes, self.row_scale, self.col_scale, self.bias, self.in_features)
        part = x if self.extra == self.in_features else x.index_select(-1, self.columns)
        return y + binary_matmul(part, self.extra_codes, self.extra_row_scale, self.extra_col_scale, None, self.extra)


class LatentSalientLinear(LatentLinear):
    """The trainable twin; the choice of columns stays.

    One latent v stands for both codes of a weight: B = sign(v) and, on chosen columns, B2 = sign(v - B). In units of
    r_i c_j the levels are -1-e, -1+e, 1-e, 1+e with thresholds at -1, 0 and 1, so a latent that is pushed passes the
    levels in their order. Two latents with a sign each cannot do that: between the middle levels both codes change, and
    a push that flips the first holds the second where it is, which overshoots to the outer level. The gradient of the
    weight reaches v as it is, times r_i c_j (straight-through).

    Args:
        solution: both planes.
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K) dense weight the codes were made from: it sets where between its thresholds a latent begins, as
            far as the codes allow; None begins half-way.
    """

    columns: Tensor

    def __init__(self, solution: Salient, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = solution.base.B.shape
        self.train_codes = train_codes
        base, extra = solution.base.balanced(), solution.extra.balanced()
        self.r, self.c, self.r2, self.c2 = (
            nn.Parameter(t.detach().float().clone()) for t in (base.r, base.c, extra.r, extra.c)
        )
        v = latent_codes(base.B, train_codes, target).detach()
        size = torch.full_like(extra.B, 0.5)
        if target is not None:
            unit = (base.r[:, None] * base.c[None, :])[:, solution.columns].clamp_min(1e-30)
            rest = target.detach().float()[:, solution.columns] / unit - base.B[:, solution.columns]
            # Beyond its threshold a target says nothing about how sure the code is: next to the threshold, then.
            size = (rest * extra.B).clamp(0.05, 0.95)
        v[:, solution.columns] = base.B[:, solution.columns] + extra.B * size
        self.v = nn.Parameter(v, requires_grad=train_codes)
        self.register_buffer("columns", solution.columns)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """Row and column scales of both planes."""
        return [self.r, self.c, self.r2, self.c2]

    def solution(self) -> Salient:
        """The current weight."""
        v = self.v.detach()
        B = signs(v)
        second = RowColumn(self.r2.detach(), self.c2.detach(), self._second(v))
        return Salient(RowColumn(self.r.detach(), self.c.detach(), B), second, self.columns)

    def _second(self, v: Tensor) -> Tensor:
        """B2 (N, k) from the latents (N, K)."""
        chosen = v.index_select(1, self.columns)
        return signs(chosen - signs(chosen))

    def pack(self) -> SalientLinear:
        """The current weight, packed."""
        return SalientLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        weight = straight_through(self.v) * self.r[:, None] * self.c[None, :]
        second = self._second(self.v.detach()) * self.r2[:, None] * self.c2[None, :]
        return nn.functional.linear(x, weight.index_add(1, self.columns, second), self.bias)
