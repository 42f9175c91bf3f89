"""Row x column solver: minimise f(W^) = tr((T - W^) H (T - W^)^T) over W^ = diag(r) B diag(c).

Legend: T (N, K) target, H (K, K) metric, TH (N, K) their product; r (N,), c (K,) scales, B (N, K)
signs, G = (T - W^) H the residual.

Three exact block minimisations take turns, so f never rises:
    r_i  = (t_i H q_i^T) / (q_i H q_i^T),  q_i = c o B_i                       (rows are independent)
    c    : (H o (B^T diag(r^2) B)) c = sum_i r_i B_i o (H t_i)                 (one K x K system)
    b_ij = sign( r_i c_j ( W^_ij + G_ij / H_jj ) )                             (cyclic over j, all rows at once)

Source: arXiv 2512.21651 v1. Its printed code update has the sign turned round and a factor 2 too many (it would
maximise); the form above is exact coordinate descent (lit_binq.solvers.descent), which tests check by brute force.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.row_column import RowColumn
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.descent import INNER, OUTER, descend_columns

START_ITERATIONS = 10
"""Alternating least-squares steps of the rank-one start on |T|."""


@dataclass
class RowColumnSolver(Solver):
    """Options of the closed form.

    Attributes:
        rounds: how often codes and scales take turns; two suffice before tuning.
    """

    rounds: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise LitBinqError(f"solver.rounds: got {self.rounds}, expected a number >= 0")

    def solve(self, problem: Problem) -> RowColumn:
        """Fit a row x column weight; see the base class."""
        T, H = problem.finite()
        TH, solution = T @ H, start(T, START_ITERATIONS)
        for _ in range(self.rounds):
            solution = update_codes(solution, TH, H)
            solution = update_row_scales(solution, TH, H)
            solution = update_column_scales(solution, TH, H)
        return update_row_scales(solution, TH, H) if self.rounds else solution


def start(T: Tensor, iterations: int) -> RowColumn:
    """Signs of T and the rank-one fit |T| ~ r c^T by alternating least squares."""
    B = torch.where(T >= 0, 1.0, -1.0)
    A = T.abs()
    r, c = A.mean(1), torch.ones(T.shape[1], device=T.device)
    for _ in range(iterations):
        c = (r @ A) / (r @ r).clamp_min(1e-30)
        r = (A @ c) / (c @ c).clamp_min(1e-30)
    return RowColumn(r, c, B)


def update_row_scales(s: RowColumn, TH: Tensor, H: Tensor) -> RowColumn:
    """The best r for given c and B. Rows whose q H q^T vanishes, or drowns in rounding, keep their scale.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
    """
    q = s.B * s.c
    denominator = ((q @ H) * q).sum(1)
    # Rounding leaves an error of about this size where a nearly singular H makes the terms cancel; dividing by
    # what is left would blow the scale up. It is the same for every row: |q_ij| = |c_j|.
    noise = len(s.c) * torch.finfo(H.dtype).eps * (s.c.square() * H.diagonal()).sum()
    r = torch.where(denominator > noise, (q * TH).sum(1) / denominator, s.r)
    return RowColumn(r, s.c, s.B)


def update_column_scales(s: RowColumn, TH: Tensor, H: Tensor) -> RowColumn:
    """The best c for given r and B, or the old c where the ridge or rounding would make it worse.

    As a function of c alone, f = c^T A c - 2 c^T right + const. Arguments as in `update_row_scales`.
    """
    # In float64 from the start: where A is nearly singular, float32 rounding would open directions that it lacks.
    Br = (s.B * s.r[:, None]).double()
    A = H.double() * (Br.T @ Br)
    right = (Br * TH).sum(0)
    mean = float(A.diagonal().mean())
    if mean <= 0:
        return s
    ridged = A.clone()
    ridged.diagonal().add_(1e-8 * mean)
    L, info = torch.linalg.cholesky_ex(ridged)
    if int(info) != 0:
        return s
    c = torch.cholesky_solve(right[:, None], L)[:, 0]
    old = s.c.double()
    better = c @ (A @ c) - 2 * (c @ right) <= old @ (A @ old) - 2 * (old @ right)
    return RowColumn(s.r, c.to(s.c.dtype), s.B) if bool(better) else s


def update_codes(
    s: RowColumn, TH: Tensor, H: Tensor, *, sweeps: int = 1, inner: int = INNER, outer: int = OUTER
) -> RowColumn:
    """Coordinate descent on the codes for given r and c; arguments as in `descend_codes`."""
    scale = s.c[:, None] * s.r[None, :]
    return RowColumn(s.r, s.c, descend_codes(s.B, scale, TH, H, sweeps=sweeps, inner=inner, outer=outer))


def descend_codes(
    B: Tensor, scale: Tensor, TH: Tensor, H: Tensor, *, sweeps: int = 1, inner: int = INNER, outer: int = OUTER
) -> Tensor:
    """Coordinate descent on codes with any scales: `sweeps` cyclic passes over all columns.

    Each single step sets b_ij to the value that minimises f with all other codes fixed; a tie keeps the code.

    Args:
        B: (N, K) current codes.
        scale: (K, N): the weight that code b_ij stands for is scale_ji b_ij.
        TH: (N, K), the product T H.
        H: (K, K).
        sweeps: passes.
        inner: columns of a panel that every step updates.
        outer: columns of a panel that every inner panel updates. The result depends on neither but for rounding.

    Returns:
        (N, K), the new codes.
    """
    scale = scale.contiguous()
    size, start_weights = scale.abs(), B.T * scale
    W, G = start_weights, TH.T - H @ start_weights  # (K, N)
    # The minimiser of one weight is w + g / H_jj; a code takes its sign. A hair more of w makes a tie keep its code.
    tie_break = H.diagonal().clamp_min(1e-30) * (1 + torch.finfo(H.dtype).eps)

    def step(j: int, weights: Tensor, residual: Tensor, out: Tensor) -> None:
        torch.copysign(size[j], torch.addcmul(residual, weights, tie_break[j]), out=out)

    for _ in range(sweeps):
        W = descend_columns(W, G, H, step, inner=inner, outer=outer)
    # Weights of scale zero have no sign to lose: their codes stay.
    return torch.where(W * start_weights < 0, -B.T, B.T).T.contiguous()
