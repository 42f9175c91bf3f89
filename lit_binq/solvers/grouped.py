"""Grouped solver: minimise f(W^) = tr((T - W^) H (T - W^)^T) over W^_ij = s_{i, j // g} B_ij.

Legend: T (N, K) target, H (K, K) metric, TH (N, K) their product; g columns a group, G groups; s (N, G) scales,
B (N, K) signs; E_i (G, K): row a holds B_ij where column j is in group a, else 0, so that w^_i = s_i E_i.

Rows are independent, and two exact block minimisations take turns, so f never rises:
    s_i   : (E_i H E_i^T) s_i = E_i H t_i                                      (one G x G system a row)
    b_ij  = sign( s_ij ( W^_ij + G_ij / H_jj ) ),  G = (T - W^) H              (as in the row x column solver)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.grouped import Grouped, check_group, group_count, spread
from lit_binq.formats.latent import signs
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.row_column import descend_codes

WORKING_BYTES = 1 << 28
"""Most memory that the systems of one chunk of rows may take."""


@dataclass
class GroupedSolver(Solver):
    """Options of the closed form.

    Attributes:
        group: columns that share a scale within a row: a multiple of 8 from 8 to 1024. Costs 16 / group bits.
        rounds: how often codes and scales take turns.
    """

    group: int = 128
    rounds: int = 2

    def __post_init__(self) -> None:
        check_group(self.group, "solver.group")
        if self.rounds < 0:
            raise LitBinqError(f"solver.rounds: got {self.rounds}, expected a number >= 0")

    def solve(self, problem: Problem) -> Grouped:
        """Fit a grouped weight; see the base class."""
        T, H = problem.finite()
        solution, TH = start(T, self.group), T @ H
        for _ in range(self.rounds):
            scale = spread(solution.s, T.shape[1], self.group).T
            B = descend_codes(solution.B, scale, TH, H)
            solution = update_scales(Grouped(solution.s, B, self.group), TH, H)
        return solution


def start(T: Tensor, group: int) -> Grouped:
    """The optimum for H = I: signs of T, and the mean |T| of every row and group."""
    sizes = _group_sums(torch.ones_like(T[:1]), group)
    return Grouped(_group_sums(T.abs(), group) / sizes, signs(T), group)


def _group_sums(values: Tensor, group: int) -> Tensor:
    """Sums over each group of the last dimension: (..., K) -> (..., G)."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % group))
    return padded.unflatten(-1, (-1, group)).sum(-1)


def update_scales(s: Grouped, TH: Tensor, H: Tensor) -> Grouped:
    """The best scales for given codes; rows whose system cannot be solved for the better keep theirs.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
    """
    N, K = TH.shape
    G = group_count(K, s.group)
    # In float64 from the start: where a row's system is nearly singular, float32 rounding would open directions that
    # it lacks. A row takes its G x G system, its factor and a few rows of K.
    rows = max(1, WORKING_BYTES // (8 * (2 * G * G + 4 * K)))
    metric = H.double()
    parts = [
        _chunk_scales(s.s[i : i + rows], s.B[i : i + rows], TH[i : i + rows], metric, s.group)
        for i in range(0, N, rows)
    ]
    return Grouped(torch.cat(parts), s.B, s.group)


def _chunk_scales(old: Tensor, B: Tensor, TH: Tensor, H: Tensor, group: int) -> Tensor:
    """`update_scales` of some rows: (n, G). H is float64."""
    n, K = B.shape
    B = B.double()
    A = old.new_empty(n, old.shape[1], old.shape[1], dtype=torch.float64)  # E_i H E_i^T
    for a, first in enumerate(range(0, K, group)):
        block = slice(first, min(first + group, K))
        A[:, a] = _group_sums((B[:, block] @ H[block]) * B, group)
    right = _group_sums(B * TH, group)  # E_i H t_i
    ridged = A.clone()
    mean = A.diagonal(dim1=1, dim2=2).mean(1)
    ridged.diagonal(dim1=1, dim2=2).add_(1e-8 * mean[:, None])
    L, info = torch.linalg.cholesky_ex(ridged)
    solved = torch.cholesky_solve(right[:, :, None], L)[:, :, 0]
    before = old.double()

    def cost(s: Tensor) -> Tensor:
        return torch.einsum("na,nab,nb->n", s, A, s) - 2 * (s * right).sum(1)

    better = (info == 0) & torch.isfinite(solved).all(1)
    better &= cost(torch.where(better[:, None], solved, before)) <= cost(before)
    return torch.where(better[:, None], solved.to(old.dtype), old)
