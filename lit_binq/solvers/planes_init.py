"""Where the planes solver starts: which columns have further planes, the scales, and codes by error feedback.

Legend: T (N, K) target, H (K, K) metric, h its diagonal; planes p on the columns S_p, their scales r_p (N,), c_p (k_p,)
(lit_binq.formats.planes); R what a fit leaves of T; G = R H.

    1. A column's gain from a further plane: adding e_j at column j lowers f by 2 e_j . G_j - |e_j|^2 H_jj. The best
       e_j = a sign(G_j) with one size a for all rows gains |G_j|_1^2 / (N H_jj). The k_p columns of S_(p-1) with the
       largest gain make S_p, one plane after the other.
    2. Scales: the best quantizer of a Gaussian with as many levels, stretched for each row by the factor of a fixed
       list that makes sum_j h_j (T_ij - level)^2 least. With columns of one size, or with those of the rank-one fit of
       |T|: whichever leaves less in all. Unstretched, a row's few large weights are cut off, and where h is large for
       them that is most of the error, which no later turn repairs.
    3. Codes: columns in the order of falling h, each to its nearest levels, with the errors so far compensated
       (GPTQ's feedback, arXiv 2210.17323, act-order).

Ours, apart from the feedback. Against plain codes on unstretched scales, descent from here ends at half to a quarter
of the error (three and four planes of a 576 x 1536 layer), and one round is enough instead of three.
"""

import torch
from torch import Tensor

from lit_binq.formats.planes import Planes
from lit_binq.formats.row_column import RowColumn
from lit_binq.solvers.base import Problem
from lit_binq.solvers.row_column import START_ITERATIONS, RowColumnSolver, start
from lit_binq.statistics.error_feedback import column_by_column, inverse_factor

MOST_PLANES = 4
"""A budget of more bits is better served by ordinary integers."""

GAUSSIAN = ((1.0,), (1.229, 0.663), (1.469, 0.734, 0.367), (1.680, 0.840, 0.420, 0.210))
"""Scales of 1 to 4 planes that quantize a Gaussian best (for three and four: with equal steps), over its mean size."""

STRETCH = (0.7, 0.85, 1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0, 3.6, 4.3)
"""Factors tried on a row's scales."""

PANEL = 64
"""Rows that are tried at once on a stretch."""

DAMPING = 0.01
"""Share of H's mean diagonal added to it for the feedback, as is usual."""


def begin(T: Tensor, H: Tensor, counts: list[int]) -> Planes:
    """Steps 1 to 3.

    Args:
        T: (N, K) target.
        H: (K, K) metric.
        counts: k_p of the further planes.
    """
    sets = choose_columns(T, H, counts)
    return feedback_codes(start_scales(T, H.diagonal(), sets), T, H)


def choose_columns(T: Tensor, H: Tensor, counts: list[int]) -> list[Tensor]:
    """Step 1: S_p of all planes, int64, ascending; the first has every column."""
    K = T.shape[1]
    every = torch.arange(K, device=T.device)
    if all(k == K for k in counts):
        return [every] * (1 + len(counts))
    sets = [every]
    R = T - RowColumnSolver(rounds=1).solve(Problem(T, H)).dense()
    for k in counts:
        gain = column_gains((R @ H)[:, sets[-1]], H.diagonal()[sets[-1]])
        sets.append(sets[-1][gain.topk(k).indices].sort().values)
        R = R.index_add(1, sets[-1], start(R[:, sets[-1]], START_ITERATIONS).dense(), alpha=-1)
    return sets


def column_gains(G: Tensor, diagonal: Tensor) -> Tensor:
    """(k,) what a further code on a column takes from f, times N: |G_j|_1^2 / H_jj.

    Args:
        G: (N, k), residual times metric.
        diagonal: (k,), H_jj of the same columns.
    """
    return G.abs().sum(0).square() / diagonal.clamp_min(1e-30)


def start_scales(T: Tensor, h: Tensor, sets: list[Tensor]) -> Planes:
    """Step 2, with all codes +1.

    Args:
        T: (N, K) target.
        h: (K,) weights of the columns.
        sets: S_p.
    """
    K = T.shape[1]
    number = torch.full((K,), -1, dtype=torch.int64, device=T.device)  # planes of each column, less one
    for columns in sets:
        number[columns] += 1
    table = torch.tensor([[*row, *[0.0] * (MOST_PLANES - len(row))] for row in GAUSSIAN], device=T.device)
    factors = table[number].T[: len(sets)]  # (Q, K)
    rank_one = start(T, START_ITERATIONS)
    even = RowColumn(T.abs().mean(1), torch.ones(K, device=T.device), rank_one.B)
    best, least = rank_one, torch.inf
    for size in (even, rank_one):
        sizes = factors[:, None] * (size.r[:, None] * size.c)  # (Q, N, K)
        errors = torch.stack([_squared_errors(T, sizes, g) @ h for g in STRETCH])
        error, g = errors.min(0)
        if (total := float(error.sum())) < least:
            stretch = torch.tensor(STRETCH, device=T.device)[g]
            best, least = RowColumn(size.r * stretch, size.c, size.B), total
    planes = [
        RowColumn(best.r, best.c[columns] * factors[p, columns], torch.ones_like(T[:, columns]))
        for p, columns in enumerate(sets)
    ]
    return Planes(planes, sets[1:])


def _squared_errors(T: Tensor, sizes: Tensor, g: float) -> Tensor:
    """(N, K): squared distance of T's elements to their levels by signs taken one after the other.

    Panels of rows that stay in the processor's cache, and two buffers: this is tried for every stretch.

    Args:
        T: (N, K).
        sizes: (Q, N, K), not negative.
        g: what sizes are multiplied by.
    """
    errors = torch.empty_like(T)
    for rows in range(0, len(T), PANEL):
        target, level = T[rows : rows + PANEL], errors[rows : rows + PANEL]
        rest, size = torch.empty_like(target), torch.empty_like(target)
        level.zero_()
        for whole in sizes[:, rows : rows + PANEL]:
            torch.mul(whole, g, out=size)
            torch.sub(target, level, out=rest)
            level += torch.copysign(size, rest, out=size)
        level.sub_(target).square_()
    return errors


def feedback_codes(s: Planes, T: Tensor, H: Tensor) -> Planes:
    """Step 3: codes of all planes for their scales as they are, which are not negative here.

    Args:
        s: scales and columns; its codes are not read.
        T: (N, K) target.
        H: (K, K) metric.
    """
    N, K = T.shape
    sets = [torch.arange(K, device=T.device), *s.columns]
    sizes = torch.zeros(len(sets), K, N, device=T.device)
    depth = [0] * K
    for size, plane, columns in zip(sizes, s.planes, sets, strict=True):
        size[columns] = (plane.r[:, None] * plane.c).T.abs()
        for j in columns.tolist():
            depth[j] += 1
    order = H.diagonal().argsort(descending=True, stable=True)
    original = order.tolist()
    levels = torch.zeros_like(sizes)  # signed, by original column

    def quantize(w: Tensor, i: int) -> Tensor:
        j = original[i]
        total = torch.zeros_like(w)
        for p in range(depth[j]):
            levels[p, j] = torch.copysign(sizes[p, j], w - total)
            total = total + levels[p, j]
        return total

    column_by_column(T[:, order], inverse_factor(H[order][:, order], DAMPING), quantize)
    planes = [
        RowColumn(plane.r.abs(), plane.c.abs(), torch.where(torch.signbit(level[columns]), -1.0, 1.0).T.contiguous())
        for plane, level, columns in zip(s.planes, levels, sets, strict=True)
    ]
    return Planes(planes, s.columns)
