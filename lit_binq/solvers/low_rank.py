"""Low-rank solver: minimise f(W^) = tr((T - W^) H (T - W^)^T) over W^ = diag(u) A diag(v) B diag(w).

Legend: T (N, K) target, H (K, K) metric, H = L L^T; A (N, k), B (k, K) signs; u (N,), v (k,), w (K,) scales;
P = diag(u) A (N, k), Q = diag(v) B diag(w) (k, K), W^ = P Q; M = P^T P (k, k).

Start. The best W^ of rank k without signs follows from the SVD of T L, W^ = X Y with X (N, k), Y (k, K). X O and O^T Y
are the same weight for every rotation O (k, k): that one is sought whose rows of X and columns of Y, each of unit
length, lie closest to signs, by alternating signs and a Procrustes fit (iterative quantization, ITQ, of both factors
at once; see Gong and Lazebnik, CVPR 2011, for one). Rows of X and columns of Y have scales of their own, so their
lengths do not matter.

Then the factors take turns. Given Q, P is a row x column problem in the metric Q H Q^T with the target T H Q^T: codes
by its coordinate descent, u and v by its closed forms, all exact.

Given P, f = tr(M Q H Q^T) - 2 tr(P^T T H Q^T) + const couples the rows of Q through M. For rows of a panel p with
curvature c_p = the largest eigenvalue of M_pp,

    f(Q + E) <= f(Q) - 2 tr(E G^T) + c_p tr(E H E^T),      G = P^T (T - P Q) H,  E zero outside the panel,

with equality at E = 0: a row x column problem for the panel in the metric H with the target times metric Q H + G / c_p.
Lowering the bound lowers f. v and w have exact closed forms again. So f never rises.

Source of the format: arXiv 2505.11076 (DBF), which fits the factors by ADMM under diagonal weights. Start and solver
are ours and use the full metric.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.latent import signs
from lit_binq.formats.low_rank import LowRank, stored_bits
from lit_binq.formats.row_column import RowColumn
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.row_column import descend_codes, start, update_codes, update_column_scales, update_row_scales

ROTATIONS = 10
"""Steps of the search for the rotation of the start."""

PANELS = 8
"""Parts of the rows of B, updated one after the other: more follow the objective more closely."""


@dataclass
class LowRankSolver(Solver):
    """Options of the low-rank format.

    Attributes:
        rank: rank k, a multiple of 8, where no bit budget says how large; 0 takes the largest with at most one bit.
        rounds: how often the two factors take turns.
    """

    takes_bits: ClassVar[bool] = True

    rank: int = 0
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.rank < 0 or self.rank % 8:
            raise LitBinqError(f"solver.rank: got {self.rank}, expected a multiple of 8, or 0 for one bit a weight")
        if self.rounds < 0:
            raise LitBinqError(f"solver.rounds: got {self.rounds}, expected a number >= 0")

    def solve(self, problem: Problem) -> LowRank:
        """Fit both factors; see the base class."""
        (T, H), bits = problem.finite(), problem.bits
        N, K = T.shape
        if bits is not None:
            k = most_rank(N, K, bits)
        else:
            k = self.rank or most_rank(N, K, max(1.0, stored_bits(N, K, 8) / (N * K)))
        solution = svd_start(T, H, k, rotations=ROTATIONS)
        TH = T @ H
        solution = update_scales(solution, TH, H)
        for _ in range(self.rounds):
            solution = update_left(solution, TH, H)
            solution = update_right(solution, TH, H)
            solution = update_scales(solution, TH, H)
        return solution


def most_rank(N: int, K: int, bits: float) -> int:
    """The largest rank, a multiple of 8, of an (N, K) weight within `bits` true bits.

    Raises:
        LitBinqError: not even rank 8 fits.
    """
    available = bits * N * K
    if stored_bits(N, K, 8) > available:
        raise LitBinqError(
            f"closed_form.bits: got {bits:.4f} for a {N} x {K} layer, expected at least "
            f"{stored_bits(N, K, 8) / (N * K):.4f}: rank 8 with its scales takes that much"
        )
    step = stored_bits(N, K, 16) - stored_bits(N, K, 8)  # the size is linear in the rank
    return 8 + 8 * int((available - stored_bits(N, K, 8)) // step)


def svd_start(T: Tensor, H: Tensor, k: int, *, rotations: int, seed: int = 0) -> LowRank:
    """The best rank-k weight in the metric, rotated towards signs, and its signs with rank-one scales.

    Args:
        T: (N, K).
        H: (K, K), positive definite but for rounding.
        k: rank; directions beyond min(N, K) start empty and are filled by the rotation.
        rotations: steps of the search for the rotation.
        seed: of the first rotation.
    """
    X, Y = _factors(T, H, k)
    # (N + K, k), rows of unit length: they have scales of their own
    Z = torch.nn.functional.normalize(torch.cat((X, Y.T)), dim=1, eps=1e-30)
    rotation = rotate_to_signs(Z, rotations, seed)
    left, right = start(X @ rotation, 10), start(rotation.T @ Y, 10)
    return LowRank(left.r, left.B.to(T.dtype), left.c * right.r, right.B.to(T.dtype), right.c)


def rotate_to_signs(Z: Tensor, steps: int, seed: int) -> Tensor:
    """The rotation O (k, k) that brings the rows of Z O (n, k) close to a multiple of signs: sum |Z O| never falls.

    Args:
        Z: (n, k).
        steps: alternations of signs S = sign(Z O) and the best rotation for them, which maximises tr(O^T Z^T S).
        seed: of the random rotation it starts from.
    """
    k = Z.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=Z.dtype)).Q.to(Z.device)
    for _ in range(steps):
        U, _, Vt = torch.linalg.svd(Z.T @ signs(Z @ rotation))
        rotation = U @ Vt
    return rotation


def _factors(T: Tensor, H: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """X (N, k), Y (k, K) with X Y the best weight of rank k in the metric. Singular values are shared out evenly."""
    values, vectors = torch.linalg.eigh(H.double())
    values = values.clamp_min(1e-9 * values[-1].clamp_min(1e-30))
    root = vectors * values.sqrt()  # L: H = L L^T
    inverse = (vectors / values.sqrt()).T  # L^-1
    U, S, Vt = torch.linalg.svd(T.double() @ root, full_matrices=False)
    rank = min(k, len(S))
    X, Y = U[:, :rank] * S[:rank].sqrt(), (S[:rank].sqrt()[:, None] * Vt[:rank]) @ inverse
    X, Y = torch.nn.functional.pad(X, (0, k - rank)), torch.nn.functional.pad(Y, (0, 0, 0, k - rank))
    return X.to(T.dtype), Y.to(T.dtype)


def update_left(s: LowRank, TH: Tensor, H: Tensor, *, sweeps: int = 1) -> LowRank:
    """Codes and row scales of the left factor, the right one fixed.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
        sweeps: passes over the k columns of A.
    """
    Q = s.B * s.w  # v is the column scale of the left factor
    metric, target = Q @ H @ Q.T, TH @ Q.T
    left = update_codes(RowColumn(s.u, s.v, s.A), target, metric, sweeps=sweeps)
    left = update_row_scales(left, target, metric)
    return replace(s, u=left.r, A=left.B)


def update_right(s: LowRank, TH: Tensor, H: Tensor, *, sweeps: int = 1, panels: int = PANELS) -> LowRank:
    """Codes of the right factor, the left one and all scales fixed: panel by panel of the rows of B.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
        sweeps: passes over the K columns for each panel.
        panels: number of panels.
    """
    P = s.A * s.u[:, None]
    M, B = P.T @ P, s.B.clone()
    scale = s.v[:, None] * s.w  # (k, K)
    QH = (B * scale) @ H
    PTH = P.T @ TH
    rows = -(-len(s.v) // panels)
    for first in range(0, len(s.v), rows):
        p = slice(first, min(first + rows, len(s.v)))
        curvature = 1.0001 * float(torch.linalg.eigvalsh(M[p, p].double())[-1])  # rounded up
        if curvature <= 0:
            continue
        target = QH[p] + (PTH[p] - M[p] @ QH) / curvature
        B[p] = descend_codes(B[p], scale[p].T, target, H, sweeps=sweeps)
        QH[p] = (B[p] * scale[p]) @ H
    return replace(s, B=B)


def update_scales(s: LowRank, TH: Tensor, H: Tensor) -> LowRank:
    """The best u, then v, then w, the codes and the other two fixed.

    Arguments as in `update_left`. As a function of v or w alone f is a quadratic form; where rounding would make a
    solution worse, the old one stays.
    """
    Q = s.B * s.w
    left = update_row_scales(RowColumn(s.u, s.v, s.A), TH @ Q.T, Q @ H @ Q.T)
    P = s.A * left.r[:, None]
    # As the column scale of the left factor: f(v) with the metric Q H Q^T.
    v = update_column_scales(left, TH @ Q.T, Q @ H @ Q.T).c
    # As the column scale of W^ = (P diag(v) B) diag(w): the "codes" are no signs here, which the form does not need.
    full = RowColumn(torch.ones_like(s.u), s.w, (P * v) @ s.B)
    w = update_column_scales(full, TH, H).c
    return replace(s, u=left.r, v=v, w=w)
