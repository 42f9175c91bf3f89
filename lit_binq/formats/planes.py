"""The planes format: a row x column plane, and further ones on nested sets of chosen (salient) columns.

Legend: N rows, K columns; planes p = 0, 1, ..., Q - 1 on column sets S_0 = all, S_1 >= S_2 >= ..., of k_p columns;
    W^ = sum_p diag(r_p) B_p diag(c_p) P_p      r_p (N,), c_p (k_p,), B_p (N, k_p) signs, P_p (k_p, K) 0/1 selection

On a column with q planes a weight takes one of 2^q values. True bits: sum k_p / K for the codes, for the scales
16 (Q N + sum k_p) / (N K), and for every further plane that is not on all columns a bitmap of one bit a column. With
two planes of which the second is on a few columns it is the "salient columns" of the literature.

The layer is a sum of row x column products: plane p reads the columns S_p of the input only. In torch it is one
operator, which adds up the planes' weights and multiplies once; in ONNX one BinaryMatMul a plane.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_binq.formats.base import Buffer, LatentLinear, PackedLinear, Solution, code_buffer, half_buffer, register
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.operators import Product
from lit_binq.formats.packing import kept, pack_signs, packed_width, unpack_signs
from lit_binq.formats.row_column import BinaryLinear, RowColumn


@dataclass
class Planes(Solution):
    """An unpacked weight of several planes.

    Attributes:
        planes: Q planes; the first (N, K), plane p (N, k_p).
        columns: for each plane behind the first (k_p,) int64, ascending, a subset of the plane's before.
    """

    planes: list[RowColumn]
    columns: list[Tensor]

    def dense(self) -> Tensor:
        """(N, K)."""
        total = self.planes[0].dense()
        for plane, columns in zip(self.planes[1:], self.columns, strict=True):
            if len(columns) == total.shape[1]:
                total += plane.dense()
            else:
                total.index_add_(1, columns, plane.dense())
        return total

    def pack(self, bias: Tensor | None = None) -> "PlanesLinear":
        """The layer that stores it; bias (N,) or None."""
        return PlanesLinear.from_solution(self, bias)


def stored_bits(N: int, K: int, counts: Sequence[int]) -> int:
    """Bits of all stored tensors of an N x K weight with further planes on `counts` columns each."""
    bits = 8 * N * packed_width(K) + 16 * (N + K)
    for k in counts:
        bits += 8 * N * packed_width(k) + 16 * (N + k) + (8 * packed_width(K) if k < K else 0)
    return bits


def counts_of(options: Mapping[str, int]) -> list[int]:
    """k_1, k_2, ... of {"columns1": k_1, "columns2": k_2, ...}.

    Raises:
        KeyError: other names.
    """
    return [options[f"columns{p}"] for p in range(1, len(options) + 1)]


def unpacked(
    codes: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    columns: Sequence[Tensor],
    counts: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Planes:
    """What stored planes stand for, in `dtype`; the arguments are those of `planes_matmul`."""
    stored = zip(codes, row_scales, col_scales, counts, strict=True)
    planes = [RowColumn(r.to(dtype), c.to(dtype), unpack_signs(B, k, dtype)) for B, r, c, k in stored]
    return Planes(planes, list(columns))


@torch.library.custom_op("lit_binq::planes_matmul", mutates_args=())
def planes_matmul(
    x: Tensor,
    codes: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    columns: Sequence[Tensor],
    bias: Tensor | None,
    counts: Sequence[int],
) -> Tensor:
    """y = x W^^T + bias, in x's dtype, W^ the sum of Q planes.

    Args:
        x: (..., K) float.
        codes: Q times (N, ceil(k_p / 8)) uint8, see `lit_binq.formats.packing`; the first plane has all columns.
        row_scales: Q times (N,) float16.
        col_scales: Q times (k_p,) float16.
        columns: Q - 1 times (k_p,) int64, the columns of a further plane; not read where k_p = K.
        bias: (N,) float or None.
        counts: Q numbers k_p, the first is K.

    Returns:
        (..., N), dtype of x.
    """
    # At least float32: in half precision the smaller planes would drown in the first one's rounding.
    dtype = torch.promote_types(x.dtype, torch.float32)
    W = kept(codes[0], f"sum {dtype}", lambda: unpacked(codes, row_scales, col_scales, columns, counts, dtype).dense())
    return nn.functional.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))


@planes_matmul.register_fake
def _(
    x: Tensor,
    codes: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    col_scales: Sequence[Tensor],
    columns: Sequence[Tensor],
    bias: Tensor | None,
    counts: Sequence[int],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes[0].shape[0]))


@register
class PlanesLinear(PackedLinear):
    """A linear layer stored as planes of sign bits, their float16 scales and bitmaps of columns.

    Buffers, for each plane p (of the first no bitmap):
        codes{p}: (N, ceil(k_p / 8)) uint8.
        row_scale{p}: (N,) float16.
        col_scale{p}: (k_p,) float16.
        column_bits{p}: (ceil(K / 8),) uint8, least significant bit first; empty if k_p = K.
    and bias: (N,) float, or None.

    Its options are `columns1`, `columns2`, ...: k_p of the planes behind the first, each from 1 to the one before, K
    for the first; ValueError otherwise. `columns{p}` (k_p,) int64 follow from the bitmaps and are not stored.
    """

    kind: ClassVar[str] = "planes"

    @classmethod
    def tensors(cls, N: int, K: int, **options: int) -> dict[str, Buffer]:
        """The buffers; see the base class."""
        counts = counts_of(options)
        if any(not 1 <= k <= before for before, k in itertools.pairwise([K, *counts])):
            raise ValueError(f"counts {counts} of {K} columns, expected numbers >= 1 that do not rise")
        stored: dict[str, Buffer] = {}
        for p, k in enumerate([K, *counts]):
            stored[f"codes{p}"] = code_buffer(N, k)
            stored[f"row_scale{p}"] = half_buffer(N)
            stored[f"col_scale{p}"] = half_buffer(k)
            if p:
                stored[f"column_bits{p}"] = Buffer((packed_width(K) if k < K else 0,), torch.uint8)
        return stored

    @classmethod
    def derived(cls, N: int, K: int, **options: int) -> dict[str, Tensor]:
        """The columns of each further plane."""
        return {f"columns{p}": torch.arange(k) for p, k in enumerate(counts_of(options), 1)}

    @property
    def counts(self) -> list[int]:
        """k_p of the planes behind the first."""
        return counts_of(self._options)

    @classmethod
    def from_solution(cls, solution: Planes, bias: Tensor | None = None) -> "PlanesLinear":
        """Pack a solver's result; bias (N,) or None. Raises LitBinqError where a scale does not fit float16."""
        N, K = solution.planes[0].B.shape
        tensors: dict[str, Tensor] = {}
        for p, plane in enumerate(solution.planes):
            stored = BinaryLinear.from_solution(plane).weight_buffers()
            tensors |= {f"{name}{p}": tensor for name, tensor in stored.items()}
        for p, columns in enumerate(solution.columns, 1):
            tensors[f"columns{p}"] = columns
            if len(columns) < K:
                chosen = -torch.ones(1, K, device=columns.device)
                chosen[0, columns] = 1
                tensors[f"column_bits{p}"] = pack_signs(chosen)[0]
        layout = {f"columns{p}": len(columns) for p, columns in enumerate(solution.columns, 1)}
        return cls._holding(K, N, bias, tensors, **layout)

    def refresh(self) -> None:
        """Derive the chosen columns from the bitmaps: after the buffers were filled.

        Raises:
            ValueError: a bitmap that does not mark as many columns as the layout says.
        """
        for p, k in enumerate(self.counts, 1):
            if k < self.in_features:
                marked = unpack_signs(self.get_buffer(f"column_bits{p}")[None], self.in_features)[0] > 0
                columns = marked.nonzero()[:, 0]
                if len(columns) != k:
                    raise ValueError(f"column_bits{p} marks {len(columns)} columns, expected {k}")
                setattr(self, f"columns{p}", columns)

    def _stored(self, p: int) -> list[Tensor]:
        return [self.get_buffer(f"{name}{p}") for name in ("codes", "row_scale", "col_scale")]

    def _planes(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
        """codes, row_scales, col_scales, columns and counts, as `planes_matmul` wants them."""
        counts = [self.in_features, *self.counts]
        codes, rows, cols = zip(*(self._stored(p) for p in range(len(counts))), strict=True)
        columns = [self.get_buffer(f"columns{p}") for p in range(1, len(counts))]
        return list(codes), list(rows), list(cols), columns, counts

    def solution(self) -> Planes:
        """The stored weight, unpacked to float32."""
        return unpacked(*self._planes())

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentPlanesLinear":
        """The trainable layer; see the base class."""
        return LatentPlanesLinear(self.solution(), self.bias, train_codes, target)

    def products(self) -> list[Product]:
        """One product a plane; the first adds the bias."""
        products = []
        for p, k in enumerate([self.in_features, *self.counts]):
            columns = self.get_buffer(f"columns{p}") if k < self.in_features else None
            bias = None if p else self.bias
            products.append(Product("BinaryMatMul", self._stored(p), {"in_features": k}, bias, columns))
        return products

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N): one operator to torch, which multiplies once and not once a plane."""
        codes, rows, cols, columns, counts = self._planes()
        return planes_matmul(x, codes, rows, cols, columns, self.bias, counts)


class LatentPlanesLinear(LatentLinear):
    """The trainable layer; the choice of columns stays.

    One latent v stands for all codes of a weight, by its binary expansion: u_0 = v, B_p = sign(u_p) and
    u_(p+1) = 2 (u_p - B_p). With two planes the levels have thresholds -1, 0 and 1, and a latent that is pushed passes
    them in their order. A latent for each plane cannot do that: between the two middle levels both codes change, and a
    push that flips the first holds the second where it is, which overshoots to the outer level. The gradient of the
    weight reaches v as it is, times r_0 c_0 (straight-through).

    Args:
        solution: all planes.
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K) dense weight the codes were made from: it sets where between its thresholds a latent begins, as
            far as the codes allow; None begins half-way.
    """

    def __init__(self, solution: Planes, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        planes = [plane.balanced() for plane in solution.planes]
        self.out_features, self.in_features = planes[0].B.shape
        self.train_codes = train_codes
        self.rows = nn.ParameterList([plane.r.detach().float().clone() for plane in planes])
        self.cols = nn.ParameterList([plane.c.detach().float().clone() for plane in planes])
        v = latent_codes(planes[0].B, train_codes, target).detach()
        rest = None if target is None else target.detach().float() - planes[0].dense()
        before = planes[0].B.float()  # the expansion up to the plane before
        for p, (plane, columns) in enumerate(zip(planes[1:], solution.columns, strict=True), 1):
            size = torch.ones_like(plane.B)
            if rest is not None:
                # Beyond its threshold a target says nothing about how sure the code is: next to the threshold, then.
                unit = plane.dense().abs().clamp_min(1e-30)
                size = (rest[:, columns] / unit * plane.B).clamp(0.1, 1.9)
                rest.index_add_(1, columns, plane.dense(), alpha=-1)
            v[:, columns] = before[:, columns] + 2.0**-p * size * plane.B
            before[:, columns] += 2.0**-p * plane.B
            self.register_buffer(f"columns{p}", columns)
        self.v = nn.Parameter(v, requires_grad=train_codes)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _columns(self) -> list[Tensor]:
        return [self.get_buffer(f"columns{p}") for p in range(1, len(self.rows))]

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """Row and column scales of all planes."""
        return [*self.rows, *self.cols]

    def _further(self) -> list[Tensor]:
        """B_p (N, k_p) of the planes behind the first."""
        codes: list[Tensor] = []
        u = self.v.detach().clone()
        for columns in self._columns():
            u = 2 * (u - signs(u))  # (N, K); only chosen columns are read
            codes.append(signs(u.index_select(1, columns)))
        return codes

    def solution(self) -> Planes:
        """The current weight."""
        codes = [signs(self.v.detach()), *self._further()]
        planes = [RowColumn(r.detach(), c.detach(), B) for r, c, B in zip(self.rows, self.cols, codes, strict=True)]
        return Planes(planes, self._columns())

    def pack(self) -> PlanesLinear:
        """The current weight, packed."""
        return PlanesLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        weight = straight_through(self.v) * self.rows[0][:, None] * self.cols[0][None, :]
        for p, (B, columns) in enumerate(zip(self._further(), self._columns(), strict=True), 1):
            weight = weight.index_add(1, columns, B * self.rows[p][:, None] * self.cols[p][None, :])
        return nn.functional.linear(x, weight, self.bias)
