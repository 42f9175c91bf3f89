"""The two-plane format W(1+1), unpacked: two bits a weight pick one of four levels of its row and group, and the input
may be quantized too, to 8 bits or to four binary planes.

Legend: N rows, K columns, g columns a group, G = ceil(K / g), P outlier columns; A, B (N, K) bits; L numbers a row and
group, and with them

    L = 4    four free levels:         W^ = levels[A + 2 B]
    L = 3    tied, (m, a1, a2):        W^ = m + (2 A - 1) a1 + (2 B - 1) a2
    L = 2    tied without mean:        the same with m = 0

Stored order of columns: outlier columns first, ascending, then all others, ascending. Codes and groups follow it. In
what is stored 2 A + B is the rank of a level among its four, ascending, and a1 >= a2 >= 0.

Input (lit_binq.formats.activations): not quantized; every column to 8 bits; or outlier columns to 8 bits and all
others to one of 16 levels zeta + sum_k rho_k b_k of the token's range, which four binary planes b_k make up.

True bits: 2 + 16 L / g, and with outliers a bitmap of K bits, with 4-bit inputs 5 float16 scales, with static ranges
4 float32.

Source: W(1+1)A(1x4) (arXiv 2504.05352), as far as its abstract and descriptions at second hand say. The stored order,
the canonical codes and the way ranges and scales are stored are ours.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import Solution

if TYPE_CHECKING:
    from lit_binq.formats.two_plane.linear import TwoPlaneLinear

RANK = [0, 2, 1, 3]
"""2 A + B of the code A + 2 B, and the other way round."""


def _no_columns() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class InputFormat:
    """How the input of a layer is quantized.

    Attributes:
        activation_bits: 0 (not at all), 4 or 8.
        outliers: (P,) int64, ascending: columns that stay at 8 bits where the others get 4; P is a multiple of 8.
        scales: (5,) zeta, rho_0..rho_3 of the 4-bit part; None for evenly spaced levels.
        range: (4,) float32: least value and range of the 4-bit part, the same of the 8-bit part; None finds them for
            each token.
    """

    activation_bits: int = 0
    outliers: Tensor = field(default_factory=_no_columns)
    scales: Tensor | None = None
    range: Tensor | None = None

    def check(self, in_features: int) -> None:
        """Refuse what cannot be stored.

        Raises:
            LitBinqError: other bits, outliers that are no ascending columns or not whole bytes of them, or all
                columns; scales or ranges of another shape.
        """
        if self.activation_bits not in (0, 4, 8):
            raise LitBinqError(f"activation_bits: got {self.activation_bits}, expected 0, 4 or 8")
        P = len(self.outliers)
        inside = bool(((self.outliers >= 0) & (self.outliers < in_features)).all())
        if P % 8 or not inside or (P and in_features == P) or bool((self.outliers.diff() < 1).any()):
            raise LitBinqError(
                f"outliers: got {P} of {in_features} columns, expected a multiple of 8, fewer than all, each once and "
                "ascending"
            )
        for name, tensor, size in (("scales", self.scales, 5), ("range", self.range, 4)):
            if tensor is not None and tensor.shape != (size,):
                raise LitBinqError(f"input {name}: got shape {tuple(tensor.shape)}, expected ({size},)")


@dataclass
class TwoPlane(Solution):
    """An unpacked weight of two planes.

    Attributes:
        levels: (N, G, L) float, see the head of this file.
        codes: (N, K) uint8, A + 2 B, in stored order.
        group: g.
        inputs: how the input is quantized; its outliers fix the stored order.
    """

    levels: Tensor
    codes: Tensor
    group: int
    inputs: InputFormat = field(default_factory=InputFormat)

    def stored_dense(self) -> Tensor:
        """(N, K), columns in stored order."""
        return by_code(four_levels(self.levels), self.codes, self.group)

    def dense(self) -> Tensor:
        """(N, K), columns in the input's order."""
        W = self.stored_dense()
        if not len(self.inputs.outliers):
            return W
        return W.index_select(1, stored_order(self.inputs.outliers, W.shape[1]).argsort())

    def pack(self, bias: Tensor | None = None) -> "TwoPlaneLinear":
        """The layer that stores it; bias (N,) or None."""
        from lit_binq.formats.two_plane.linear import TwoPlaneLinear  # which knows this class

        return TwoPlaneLinear.from_solution(self, bias)

    def with_inputs(self, inputs: InputFormat) -> "TwoPlane":
        """The same weight for an input quantized otherwise.

        Raises:
            LitBinqError: other outliers: they fix the groups, so a weight has to be solved for them.
        """
        inputs.check(self.codes.shape[1])
        require_same(self.inputs.outliers, inputs.outliers)
        return replace(self, inputs=inputs)

    def canonical(self) -> "TwoPlane":
        """The same weight with codes whose 2 A + B is the rank of their level."""
        levels = self.levels
        if levels.shape[-1] == 4:
            levels, order = levels[..., RANK].sort(dim=-1, stable=True)
            table = swapped(order.argsort(-1))[..., RANK]  # of a code, its new code
            levels = levels[..., RANK]
        else:
            a = levels[..., -2:]
            A, B = (torch.arange(4, device=a.device) >> bit & 1 for bit in (0, 1))
            A, B = (bit ^ (size < 0).long()[..., None] for bit, size in zip((A, B), a.unbind(-1), strict=True))
            larger = (a[..., 1].abs() > a[..., 0].abs())[..., None]
            table = torch.where(larger, B + 2 * A, A + 2 * B)
            levels = torch.cat((levels[..., :-2], a.abs().sort(-1, descending=True).values), -1)
        codes = by_code(table, self.codes, self.group).to(torch.uint8)
        return replace(self, levels=levels, codes=codes)


def swapped(rank: Tensor) -> Tensor:
    """2 A + B to A + 2 B, or back."""
    return rank // 2 + rank % 2 * 2


def require_same(here: Tensor, there: Tensor) -> None:
    """Raise LitBinqError where two lists of outliers (P,) differ."""
    if not torch.equal(here.to(there.device), there):
        raise LitBinqError(
            f"outliers: got {len(there)} columns that are not the {len(here)} the weight was solved for; expected "
            "the same, since they fix its groups"
        )


def four_levels(levels: Tensor) -> Tensor:
    """(..., L) to the four levels (..., 4), by code A + 2 B."""
    if levels.shape[-1] == 4:
        return levels
    a1, a2 = levels[..., -2], levels[..., -1]
    m = levels[..., 0] if levels.shape[-1] == 3 else torch.zeros_like(a1)
    return torch.stack((m - a1 - a2, m + a1 - a2, m - a1 + a2, m + a1 + a2), -1)


def by_code(table: Tensor, codes: Tensor, group: int) -> Tensor:
    """The entry of every weight: table (N, G, 4), codes (N, K) 0 to 3, g, to (N, K)."""
    groups = torch.arange(codes.shape[1], device=codes.device) // group
    return table.flatten(1).gather(1, 4 * groups + codes.long())


def stored_order(outliers: Tensor, in_features: int) -> Tensor:
    """(K,) int64: the columns in stored order. outliers (P,) int64 ascending."""
    marked = torch.zeros(in_features, dtype=torch.bool, device=outliers.device)
    marked[outliers] = True
    return marked_first(marked)


def marked_first(marked: Tensor) -> Tensor:
    """(K,) int64: the columns in stored order, from a mask (K,) bool of the outliers."""
    # A stable sort, for its shape does not depend on what is marked: a CUDA graph can hold it.
    return marked.logical_not().to(torch.uint8).argsort(stable=True)
