"""ARB, first order: row mean, row scale and codes take turns on the weight alone.

Legend: T (N, K) target; W^ = m + a B, m (N,) means, a (N,) scales, B (N, K) signs. With f = |T - W^|^2:

    m = mean_j (T - a B),    a = mean_j B (T - m),    B = sign(a (T - m))        each the minimiser for all else given

Start: m = mean_j T, B = sign(T - m), a = mean_j |T - m| (XNOR). Source: arXiv 2410.03129. Weight alignment: the metric
H says nothing here, as in the paper; with `objective: weight` nothing is lost by that. Deviation: one mean and scale
for the whole row, not for blocks of it within BiLLM's zones; those are BiLLM's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.formats.base import half_scales
from lit_binq.formats.dense_only import CountedSolution
from lit_binq.formats.packing import packed_width
from lit_binq.solvers.base import Problem, Solver


@dataclass
class RowMean(CountedSolution):
    """W^_ij = m_i + a_i B_ij: one bit a weight, a mean and a scale a row; 1 + 32 / K bits.

    Attributes:
        m: (N,) row means, float.
        a: (N,) row scales, float.
        B: (N, K) signs, -1 or +1, float.
    """

    m: Tensor
    a: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """(N, K)."""
        return self.m[:, None] + self.a[:, None] * self.B

    def rounded(self) -> "RowMean":
        """Means and scales as float16 holds them; see the base class."""
        return RowMean(half_scales(self.m, "row_mean").float(), half_scales(self.a, "row_scale").float(), self.B)

    def stored_bits(self) -> int:
        """Codes, and two float16 a row."""
        N, K = self.B.shape
        return N * (8 * packed_width(K) + 32)


ITERATIONS = 15
"""Rounds of the alternation, as the paper has it."""


@dataclass
class ARB(Solver):
    """ARB, which has no options."""

    deployable: ClassVar[bool] = False

    def solve(self, problem: Problem) -> RowMean:
        """Fit row means, scales and codes; see the base class."""
        T, _ = problem.finite()
        return alternate(T, ITERATIONS)


def start(T: Tensor) -> RowMean:
    """Mean, sign and mean size of each row of T (N, K)."""
    m = T.mean(1)
    rest = T - m[:, None]
    return RowMean(m, rest.abs().mean(1), torch.where(rest >= 0, 1.0, -1.0).to(T.dtype))


def update(s: RowMean, T: Tensor) -> RowMean:
    """One round: m, then a, then B."""
    m = (T - s.a[:, None] * s.B).mean(1)
    rest = T - m[:, None]
    a = (s.B * rest).mean(1)
    return RowMean(m, a, torch.where(a[:, None] * rest >= 0, 1.0, -1.0).to(T.dtype))


def alternate(T: Tensor, iterations: int) -> RowMean:
    """`iterations` rounds from the start, T (N, K)."""
    s = start(T)
    for _ in range(iterations):
        s = update(s, T)
    return s
