"""ARB-X: row mean and row scale fitted to the layer's output, codes those of the weight solution.

Legend: T (N, K) target, H (K, K) metric (S of the calibration data); W^ = m + a B with B (N, K) from ARB, frozen;
u = H 1 (K,), and for a row: t its target, b its codes. With f = (t - m 1 - a b) H (t - m 1 - a b)^T:

    m = (t u - a b u) / (1 u),    a = (t H b^T - m b u) / (b H b^T)        each the minimiser for the other given

Source: arXiv 2410.03129. It needs the Gram alone, which makes it the pseudo target of arXiv 2512.21651: T = W,
H = S. Under the objective `true_target` the same fit has another T. Deviation: one mean and scale for the whole row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.baselines.arb import ITERATIONS, RowMean, alternate


@dataclass
class ARBX(Solver):
    """ARB-X, which has no options."""

    deployable: ClassVar[bool] = False

    def solve(self, problem: Problem) -> RowMean:
        """Fit row means and scales under H; see the base class."""
        T, H = problem.finite()
        return align(alternate(T, ITERATIONS), T, H, ITERATIONS)


def align(s: RowMean, T: Tensor, H: Tensor, iterations: int) -> RowMean:
    """Alternate m and a under H with the codes of `s`. All products are made once, in float64.

    A row whose b H b^T vanishes or drowns in rounding keeps its scale, and all keep their means if 1 H 1^T does.
    """
    B, Hd = s.B.double(), H.double()
    u = Hd.sum(1)
    TH = T.double() @ Hd
    tu, bu, tb = TH.sum(1), B @ u, (TH * B).sum(1)
    bb, ones = ((B @ Hd) * B).sum(1), u.sum()
    # H comes in float32: sums over all its entries are known up to about this.
    noise = len(H) * torch.finfo(H.dtype).eps * Hd.diagonal().sum()
    m, a = s.m.double(), s.a.double()
    for _ in range(iterations):
        m = torch.where(ones > noise, (tu - a * bu) / ones, m)
        a = torch.where(bb > noise, (tb - m * bu) / bb, a)
    return RowMean(m.to(T.dtype), a.to(T.dtype), s.B)
