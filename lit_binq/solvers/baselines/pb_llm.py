"""PB-LLM: the most salient weights at 8 bits with their positions, all others one bit with a row scale.

Legend: T (N, K) target, H (K, K) metric; U the upper Cholesky factor of the damped H's inverse; r, B, s, Q and the mask
as in `Sparse8`.

    1. P = T^2 / U_jj^2; the `share` of the weights with the largest P is chosen.
    2. s_i = max_j |T_ij| / 127 over the row's chosen weights, Q the nearest whole numbers.
    3. r_i = mean |T_ij| over the row's other weights, B = sign(T).
    4. Columns go from left to right with scales and mask fixed, and each one's error is compensated on
       those to come (lit_binq.statistics.error_feedback).

Source: arXiv 2310.00034. Deviations: the signs have a row scale and no mean, the 8-bit values are symmetric and their
scale is that of the chosen weights alone.

True bits: 1 (signs) + 1 (mask) + 8 share + 32 / K: 2.8 for a tenth, where papers print 1.7.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import half_scales
from lit_binq.formats.dense_only import CountedSolution
from lit_binq.formats.packing import packed_width
from lit_binq.solvers.base import Problem, Solver
from lit_binq.statistics.error_feedback import column_by_column, inverse_factor


@dataclass
class Sparse8(CountedSolution):
    """W^_ij = s_i Q_ij where a weight is chosen, else r_i B_ij.

    Attributes:
        r: (N,) scales of the signs, float.
        B: (N, K) signs, -1 or +1, float; where a weight is chosen they say nothing.
        s: (N,) scales of the 8-bit values, float.
        Q: (N, K) whole numbers from -127 to 127, float; zero where a weight is not chosen.
        mask: (N, K) bool, the chosen weights.
    """

    r: Tensor
    B: Tensor
    s: Tensor
    Q: Tensor
    mask: Tensor

    def dense(self) -> Tensor:
        """(N, K)."""
        return torch.where(self.mask, self.s[:, None] * self.Q, self.r[:, None] * self.B)

    def rounded(self) -> "Sparse8":
        """Both scales as float16 holds them; see the base class."""
        r, s = half_scales(self.r, "row_scale").float(), half_scales(self.s, "value_scale").float()
        return Sparse8(r, self.B, s, self.Q, self.mask)

    def stored_bits(self) -> int:
        """Signs, kept at chosen places too, the mask, the chosen values at 8 bits, and two float16 a row."""
        N, K = self.B.shape
        return N * (16 * packed_width(K) + 32) + 8 * int(self.mask.sum())


DAMPING = 0.01
"""Share of the metric's mean diagonal that is added to it before it is inverted."""


@dataclass
class PBLLM(Solver):
    """Options of PB-LLM.

    Attributes:
        share: share of the weights kept at 8 bits.
    """

    deployable: ClassVar[bool] = False
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise LitBinqError(f"solver.share: got {self.share}, expected a share from 0 to 1")

    def solve(self, problem: Problem) -> Sparse8:
        """Fit chosen values and signs; see the base class."""
        T, H = problem.finite()
        U = inverse_factor(H, DAMPING)
        P = T.square() / U.diagonal().square()
        mask = torch.zeros(T.numel(), dtype=torch.bool, device=T.device)
        mask[P.flatten().topk(round(self.share * T.numel())).indices] = True
        mask = mask.reshape(T.shape)
        s = (T.abs() * mask).amax(1) / 127
        r = (T.abs() * ~mask).sum(1) / (~mask).sum(1).clamp_min(1)

        def values(w: Tensor) -> Tensor:
            return torch.where(s > 0, w / s, 0.0).round().clamp(-127, 127)

        def quantize(w: Tensor, j: int) -> Tensor:
            sign = torch.where(w >= 0, 1.0, -1.0)
            return torch.where(mask[:, j], s * values(w), r * sign)

        # What is stored follows from the quantized values: their signs, or whole numbers of steps.
        W = column_by_column(T, U, quantize)
        Q = torch.where(mask, values(W.T).T, 0.0)
        return Sparse8(r, torch.where(W >= 0, 1.0, -1.0).to(T.dtype), s, Q, mask)
