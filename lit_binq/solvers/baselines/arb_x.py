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

from lit_binq.solvers.base import Solver, require_finite
from lit_binq.solvers.baselines.arb import RowMean, alternate, check_iterations


@dataclass
class ARBX(Solver):
    """Options of ARB-X.

    Attributes:
        iterations: rounds of the weight solution, which gives the codes.
        output_iterations: rounds of mean and scale under the metric.
    """

    deployable: ClassVar[bool] = False
    iterations: int = 15
    output_iterations: int = 15

    def __post_init__(self) -> None:
        check_iterations(self.iterations)
        check_iterations(self.output_iterations)

    def solve(self, T: Tensor, H: Tensor, *, bits: float | None = None) -> RowMean:
        """Fit row means and scales under H, float32; see the base class. `bits` says nothing here."""
        require_finite(T, H)
        return align(alternate(T, self.iterations), T, H, self.output_iterations)


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
