"""Two-plane solver W(1+1): lower f(W^) = tr((T - W^) H (T - W^)^T) over four levels a row and group of g columns.

Legend: T (N, K) target, H (K, K) metric, TH their product, columns in the format's stored order; G groups, L numbers p
a row and group and the four levels they make, see lit_binq.solvers.four_means; ranks (N, K), 0 to 3, of a weight's
level among its four.

    1. Group by group from left to right: levels by EM with H's diagonal as weights (weighted 1-D 4-means), then column
       by column the nearest level, each column's error compensated on all columns to come, in this group and after it.
    2. Rounds of refinement, each an exact block minimisation, so that f never rises:
       ranks by coordinate descent: the level nearest to W^_ij + ((T - W^) H)_ij / H_jj, all rows at once;
       levels by least squares: one system of G L unknowns a row.

Source: step 1 is W(1+1)A(1x4)'s (arXiv 2504.05352): binarization in fine groups by EM weighted with the Hessian, and
GPTQ's error compensation (arXiv 2210.17323). What it leaves unclear is ours: that errors are compensated column by
column as in GPTQ, and that a group's levels are found after the errors of all groups before it are in its weights. Tied
means and step 2 are ours. Any pair (T, H) will do, the true target's too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.grouped import check_group, spread
from lit_binq.formats.two_plane.solution import RANK, TwoPlane, stored_order, swapped
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.descent import INNER, OUTER, descend_columns
from lit_binq.solvers.four_means import by_rank, four_means
from lit_binq.statistics.error_feedback import column_by_column, inverse_factor

WORKING_BYTES = 1 << 28
"""Most memory that the systems of one chunk of rows may take."""


DAMPING = 0.01
"""Share of the metric's mean diagonal that is added to it before it is inverted for the feedback."""

EM_STEPS = 12
"""EM steps from every start."""


@dataclass
class TwoPlaneSolver(Solver):
    """Options of the two-plane format.

    Attributes:
        group: columns of a row that share their levels: a multiple of 8 from 8 to 1024.
        levels: numbers that make the four levels: 4 (free), 3 (tied: m -+ a1 -+ a2) or 2 (tied, m = 0). Each costs
            16 / group bits.
        hessian: weigh the weights of a group by H's diagonal where its levels are found; false counts them alike.
        refine: how often ranks and levels take turns afterwards.
    """

    quantizes_inputs: ClassVar[bool] = True

    group: int = 128
    levels: int = 4
    hessian: bool = True
    refine: int = 2

    def __post_init__(self) -> None:
        check_group(self.group, "solver.group")
        if self.levels not in (2, 3, 4):
            raise LitBinqError(f"solver.levels: got {self.levels}, expected 4 (free), 3 (tied) or 2 (tied, no mean)")
        if self.refine < 0:
            raise LitBinqError(f"solver.refine: got {self.refine}, expected a number >= 0")

    def solve(self, problem: Problem) -> TwoPlane:
        """Fit a two-plane weight; see the base class.

        Outliers of the input come first in the stored order, which groups follow; all else that `inputs` says is only
        noted in the result.
        """
        (T, H), inputs = problem.finite(), problem.inputs
        inputs.check(T.shape[1])
        if len(inputs.outliers):
            order = stored_order(inputs.outliers.to(T.device), T.shape[1])
            T, H = T[:, order], H[order][:, order]
        p, ranks = self._begin(T, H)
        TH = T @ H if self.refine else T
        for _ in range(self.refine):
            ranks = descend_ranks(p, ranks, TH, H, self.group)
            p, ranks = update_levels(p, ranks, TH, H, self.group)
        levels = p[..., RANK] if self.levels == 4 else p
        return TwoPlane(levels, swapped(ranks), self.group, inputs)

    def _begin(self, T: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """Step 1: p (N, G, L) and ranks (N, K)."""
        W, K = T.clone(), T.shape[1]
        h = H.diagonal() if self.hessian else torch.ones_like(T[0])
        U = inverse_factor(H, DAMPING)
        numbers, ranks = [], []
        for begin in range(0, K, self.group):
            end = min(begin + self.group, K)
            w = W[:, begin:end]
            p, _ = four_means(w, h[begin:end], self.levels, EM_STEPS)
            numbers.append(p)
            ranks.append(_with_feedback(W, begin, end, by_rank(p), U))
        return torch.stack(numbers, 1), torch.cat(ranks, 1)


def _with_feedback(W: Tensor, begin: int, end: int, levels: Tensor, U: Tensor) -> Tensor:
    """Ranks (N, end - begin) of a group's columns; their errors go to later columns of W (N, K), in place.

    Args:
        W: (N, K), errors of earlier groups compensated.
        begin: the group's first column.
        end: the first after it.
        levels: (N, 4) ascending.
        U: (K, K), see `lit_binq.statistics.error_feedback`.
    """
    w, inside = W[:, begin:end], U[begin:end, begin:end]
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    ranks = torch.empty(end - begin, len(W), dtype=torch.int64, device=W.device)

    def quantize(column: Tensor, j: int) -> Tensor:
        torch.sum(column[:, None] > middles, 1, out=ranks[j])
        return levels.gather(1, ranks[j][:, None])[:, 0]

    Q = column_by_column(w, inside, quantize)
    if end < W.shape[1]:
        # Every column's error e_j, from w - q = e U within the group.
        errors = torch.linalg.solve_triangular(inside, w - Q, upper=True, left=False)
        W[:, end:].addmm_(errors, U[begin:end, end:], alpha=-1)
    return ranks.T.to(torch.uint8)


def descend_ranks(
    p: Tensor, ranks: Tensor, TH: Tensor, H: Tensor, group: int, *, inner: int = INNER, outer: int = OUTER
) -> Tensor:
    """One pass of coordinate descent over all columns; see `descent.descend_columns` for the panels.

    Each step gives a weight the level that minimises f with all other weights fixed; a tie keeps the level.

    Args:
        p: (N, G, L), canonical.
        ranks: (N, K).
        TH: (N, K), the product T H.
        H: (K, K).
        group: g.
        inner: columns of a panel that every step updates.
        outer: columns of a panel that every inner panel updates. The result depends on neither but for rounding.

    Returns:
        (N, K) uint8.
    """
    K = TH.shape[1]
    levels = by_rank(p).permute(1, 2, 0).contiguous()  # (G, 4, N)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    W = torch.cat([levels[j // group].gather(0, ranks[:, j][None].long()) for j in range(K)])  # (K, N)
    over = 1 / H.diagonal().clamp_min(1e-30)

    def step(j: int, weights: Tensor, residual: Tensor, out: Tensor) -> None:
        level, middle = levels[j // group], middles[j // group]
        way = residual * over[j]  # from the weight to the best value
        best = weights + way
        low = torch.where(best > middle[0], level[1], level[0])
        high = torch.where(best > middle[2], level[3], level[2])
        chosen = torch.where(best > middle[1], high, low)
        torch.where((best - chosen).abs() < way.abs(), chosen, weights, out=out)

    new = descend_columns(W, TH.T - H @ W, H, step, inner=inner, outer=outer)
    # A weight that moved has as its rank the number of levels below it, of equal levels the first.
    below = torch.stack([new > spread(level.T, K, group).T for level in levels.unbind(1)]).sum(0)
    return torch.where(new == W, ranks.T, below.to(torch.uint8)).T.contiguous()


def update_levels(p: Tensor, ranks: Tensor, TH: Tensor, H: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The best levels for given ranks; rows whose system cannot be solved for the better keep theirs.

    Args:
        p: (N, G, L), canonical.
        ranks: (N, K).
        TH: (N, K), the product T H.
        H: (K, K).
        group: g.

    Returns:
        p (N, G, L), canonical, and ranks (N, K) to go with it: levels may have changed places.
    """
    K, unknowns = TH.shape[1], p[0].numel()
    rows = max(1, WORKING_BYTES // (8 * (3 * unknowns**2 + 8 * K)))
    metric = H.double()
    chunks = zip(p.split(rows), ranks.split(rows), TH.split(rows), strict=True)
    new = torch.cat([_chunk_levels(*chunk, metric, group) for chunk in chunks])
    return reordered(new, ranks, group)


def reordered(p: Tensor, ranks: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The same weight with canonical numbers."""
    s = TwoPlane(p[..., RANK] if p.shape[-1] == 4 else p, swapped(ranks), group).canonical()
    return (s.levels[..., RANK] if p.shape[-1] == 4 else s.levels), swapped(s.codes)


def _chunk_levels(old: Tensor, ranks: Tensor, TH: Tensor, H: Tensor, group: int) -> Tensor:
    """The best numbers (n, G, L) of some rows, in whatever order. H is float64."""
    n, G, L = old.shape
    K = ranks.shape[1]
    # What each of the L numbers of its group adds to a weight: (L, 4) by rank, (L, n, K) by weight.
    features = by_rank(torch.eye(L, dtype=torch.float64, device=H.device))[:, ranks.long()]
    A = H.new_empty(n, G, L, G, L)
    for a in range(G):
        block = slice(a * group, min((a + 1) * group, K))
        for k in range(L):
            product = features[k][:, block] @ H[block, a * group :]  # groups from a on: A is symmetric
            for i in range(L):
                part = _group_sums(product * features[i][:, a * group :], group)
                A[:, a, k, a:, i] = part
                A[:, a:, i, a, k] = part
    A = A.view(n, G * L, G * L)
    right = torch.stack([_group_sums(f * TH, group) for f in features], -1).view(n, G * L)
    before = old.double().view(n, G * L)
    left = right - torch.einsum("nab,nb->na", A, before)
    ridged = A.clone()
    ridge = 1e-8 * A.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    # A level that no weight has gets no equation: it stays.
    ridged.diagonal(dim1=1, dim2=2).add_(ridge.clamp_min(1e-300))
    factor, info = torch.linalg.cholesky_ex(ridged)
    step = torch.cholesky_solve(left[:, :, None], factor)[:, :, 0]
    gain = 2 * (step * left).sum(1) - torch.einsum("na,nab,nb->n", step, A, step)
    better = (info == 0) & torch.isfinite(step).all(1) & (gain > 0)
    return torch.where(better[:, None], (before + step).to(old.dtype), old.view(n, G * L)).view(n, G, L)


def _group_sums(values: Tensor, group: int) -> Tensor:
    """Sums over each group of the last dimension: (..., K) -> (..., G)."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % group))
    return padded.unflatten(-1, (-1, group)).sum(-1)
