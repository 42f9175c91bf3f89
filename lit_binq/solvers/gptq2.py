"""Uniform two bits by GPTQ, the baseline that two free planes are to be compared with.

Legend: T (N, K) target, H (K, K) metric (lit_binq.statistics.objectives), columns in stored order (outliers first); g
columns a group; of a row and group lo and s: the four levels lo, lo + s, lo + 2 s, lo + 3 s.

Group by group, from left to right: the grid comes from the group's columns as they are by then, with all errors so far
compensated; its columns are rounded to the grid one by one, and the columns to come make good what that does wrong
(lit_binq.statistics.error_feedback). Source: GPTQ (arXiv 2210.17323) with groups and an asymmetric grid. Deviations:
the grid need not hold zero, so that no zero point has to be rounded; the clipped grid lowers the squared error, not the
2.4th power; columns keep their order.

Four equally spaced levels are the tied levels of the two-plane format: m = lo + 1.5 s, a1 = s, a2 = s / 2. So stored
they take 2 + 48 / g bits, where a scale of 16 and a zero point of 2 bits would take 2 + 18 / g.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.formats.grouped import check_group
from lit_binq.formats.two_plane.solution import TwoPlane, stored_order, swapped
from lit_binq.solvers.base import Problem, Solver
from lit_binq.statistics.error_feedback import columns_and_errors, inverse_factor

SHARES = tuple(1 - i / 20 for i in range(15))
"""What parts of a group's range are tried as the grid's: clipped, it may have a lower squared error."""


@dataclass
class UniformTwoBitSolver(Solver):
    """Round to a uniform grid of four levels, errors fed back.

    Attributes:
        group: g, columns that share a grid; a multiple of 8.

    Raises:
        LitBinqError: a value outside its range.
    """

    quantizes_inputs: ClassVar[bool] = True

    group: int = 64

    def __post_init__(self) -> None:
        check_group(self.group)

    def solve(self, problem: Problem) -> TwoPlane:
        """Fit a weight; see the base class. LitBinqError too if H cannot be inverted."""
        (T, H), inputs = problem.finite(), problem.inputs
        order = stored_order(inputs.outliers.to(T.device), T.shape[1])
        T, U = T[:, order], inverse_factor(H[order][:, order])
        ranks, levels = [], []
        for begin in range(0, T.shape[1], self.group):
            end = min(begin + self.group, T.shape[1])
            lo, s = _grid(T[:, begin:end])
            rank = torch.empty(end - begin, len(T), dtype=torch.uint8, device=T.device)

            def quantize(w: Tensor, j: int, lo: Tensor = lo, s: Tensor = s, rank: Tensor = rank) -> Tensor:
                steps = torch.where(s > 0, (w - lo) / s, 0.0).round().clamp(0, 3)
                rank[j] = steps.to(torch.uint8)
                return lo + s * steps

            _, errors = columns_and_errors(T[:, begin:end], U[begin:end, begin:end], quantize)
            T = torch.cat((T[:, :end], T[:, end:] - errors.T @ U[begin:end, end:]), 1)
            ranks.append(rank.T)
            levels.append(torch.stack((lo + 1.5 * s, s, s / 2), -1))
        return TwoPlane(torch.stack(levels, 1), swapped(torch.cat(ranks, 1)), self.group, inputs)


def _grid(W: Tensor) -> tuple[Tensor, Tensor]:
    """lo and s (N,) of a group's weights (N, g), rounded so that float16 stores what is computed with."""
    least, greatest = W.amin(1), W.amax(1)
    best = torch.full_like(least, torch.inf)
    lo, s = torch.zeros_like(least), torch.zeros_like(least)
    for share in SHARES:
        step = ((greatest - least) * share / 3).half().to(W.dtype)
        # The middle is what is stored.
        start = ((greatest + least) / 2).half().to(W.dtype) - 1.5 * step
        steps = torch.where(step[:, None] > 0, (W - start[:, None]) / step[:, None], 0.0).round().clamp(0, 3)
        error = (W - start[:, None] - step[:, None] * steps).square().sum(1)
        better = error < best
        best, lo, s = (torch.where(better, new, old) for new, old in ((error, best), (start, lo), (step, s)))
    return lo, s
