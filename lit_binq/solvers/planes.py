"""Several row x column planes, the further ones on the columns that the objective gains most from.

Legend: T (N, K) target, H (K, K) metric; plane p: r_p (N,), c_p (k_p,), B_p (N, k_p) on the columns S_p
(lit_binq.formats.planes); W^ their sum, G = (T - W^) H.

    1. A start: columns, scales, and codes by error feedback (lit_binq.solvers.planes_init), then the scales as below.
    2. Rounds: codes by coordinate descent, all codes of a weight at once (its level nearest to w + g / H_jj), then the
       scales of each plane, rows and columns, exactly, the others fixed. f never rises.

Ours. The idea of a second plane on salient columns is BiLLM's (arXiv 2402.04291, residual approximation); here
columns, codes and scales all follow one objective, and the columns are whole columns of the matrix. Fitting plane after
plane to what the others leave ends in poor optima: three planes had twice the error of a joint descent.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.planes import Planes, stored_bits
from lit_binq.formats.row_column import RowColumn
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.descent import INNER, OUTER, descend_columns
from lit_binq.solvers.planes_init import MOST_PLANES, begin
from lit_binq.solvers.row_column import (
    START_ITERATIONS,
    RowColumnSolver,
    start,
    update_column_scales,
    update_row_scales,
)


@dataclass
class PlanesSolver(Solver):
    """Options of the planes format.

    Attributes:
        shares: share of the columns that each further plane is on, where no bit budget says it: `[0.1]` for a second
            plane on a tenth of them, `[1, 1]` for three full planes.
        rounds: how often codes and scales take turns after the start.
    """

    takes_bits: ClassVar[bool] = True

    shares: list[float] = field(default_factory=lambda: [0.1])
    rounds: int = 1

    def __post_init__(self) -> None:
        if len(self.shares) >= MOST_PLANES or any(
            not 0 <= b <= a for a, b in zip([1.0, *self.shares], self.shares, strict=False)
        ):
            raise LitBinqError(
                f"solver.shares: got {self.shares}, expected at most {MOST_PLANES - 1} shares from 0 to 1 that do "
                "not rise"
            )
        if self.rounds < 0:
            raise LitBinqError(f"solver.rounds: got {self.rounds}, expected a number >= 0")

    def solve(self, problem: Problem) -> Planes | RowColumn:
        """Fit all planes; without a further plane the result is a plain row x column weight."""
        (T, H), bits = problem.finite(), problem.bits
        N, K = T.shape
        counts = [round(share * K) for share in self.shares] if bits is None else most_columns(N, K, bits)
        counts = [k for k in counts if k]
        if not counts:
            return RowColumnSolver().solve(problem)
        TH = T @ H
        solution = update_scales(begin(T, H, counts), TH, H)
        for _ in range(self.rounds):
            solution = update_codes(solution, TH, H)
            solution = update_scales(solution, TH, H)
        return solution

    def allocate_bits(self, weights: dict[str, Tensor], moments: dict[str, Tensor], bits: float) -> dict[str, float]:
        """Further planes where they lower the layers' relative output errors most for each bit.

        The gain of a column is that of `column_gains` with rank-one fits of the weight itself for the planes and a
        diagonal metric, over the layer's output energy: every layer's relative error counts the same. One threshold on
        gain / bits for all layers, found by bisection.

        Args:
            weights: W (N, K) of every layer, by name.
            moments: E[x_j^2] (K,) of every layer's input.
            bits: true bits a weight, over all layers.

        Raises:
            LitBinqError: not even the first planes fit, or all planes take less.
        """
        gains = {name: _plane_gains(W.float(), moments[name].to(W.device).float()) for name, W in weights.items()}
        total = sum(W.numel() for W in weights.values())

        def chosen(threshold: float) -> dict[str, list[int]]:
            return {name: _columns_above(threshold, gains[name], len(W)) for name, W in weights.items()}

        def size(counts: dict[str, list[int]]) -> int:
            return sum(_stored(W, counts[name]) for name, W in weights.items())

        if (least := size({name: [] for name in weights}) / total) > bits:
            raise LitBinqError(
                f"closed_form.bits: got {bits}, expected at least {least:.4f}: signs and scales of the first plane "
                "alone take that much"
            )
        most = size({name: [W.shape[1]] * (MOST_PLANES - 1) for name, W in weights.items()}) / total
        most = math.ceil(most * 1e4) / 1e4  # what the message says is taken
        if bits > most:
            raise LitBinqError(
                f"closed_form.bits: got {bits}, expected at most {most:.4f}: "
                f"{MOST_PLANES} planes on all columns take no more"
            )
        low, high = 0.0, max(float(gains[name][0].max()) / (len(W) + 16) for name, W in weights.items())
        if size(chosen(low)) > bits * total:
            for _ in range(60):  # the size falls with the threshold; `high` always fits
                middle = (low + high) / 2
                low, high = (middle, high) if size(chosen(middle)) > bits * total else (low, middle)
        else:
            high = low
        taken = {
            name: _stored(W, counts) for (name, W), counts in zip(weights.items(), chosen(high).values(), strict=True)
        }
        # A layer's row scales come all at once, so the threshold may leave a gap: layer by layer, the best first.
        left = int(bits * total) - sum(taken.values())
        for name in sorted(taken, key=lambda n: float(gains[n][0].mean()) / (len(weights[n]) + 16), reverse=True):
            W = weights[name]
            most = _stored(W, most_columns(W.shape[0], W.shape[1], (taken[name] + left) / W.numel()))
            if most > taken[name]:
                left -= most - taken[name]
                taken[name] = most
        return {name: taken[name] / W.numel() for name, W in weights.items()}


def _stored(W: Tensor, counts: list[int]) -> int:
    return stored_bits(W.shape[0], W.shape[1], counts)


def _plane_gains(W: Tensor, moment: Tensor) -> list[Tensor]:
    """(K,) what each further plane takes of the relative output error: m_j |R_j|_1^2 / N over sum m_j |W_j|^2."""
    energy = (moment * W.square().sum(0)).sum().clamp_min(1e-30)
    gains, R = [], W
    for _ in range(MOST_PLANES - 1):
        R = R - start(R, START_ITERATIONS).dense()
        gains.append(moment * R.abs().sum(0).square() / len(W) / energy)
    return gains


def _columns_above(threshold: float, gains: list[Tensor], N: int) -> list[int]:
    """k_p of the further planes whose columns each gain more than `threshold` a bit, and pay for the row scales too."""
    counts: list[int] = []
    K = len(gains[0])
    most = K
    for gain in gains:
        k = int((gain > threshold * (N + 16)).sum())
        k = min(-(-k // 8) * 8, most)  # codes are packed to whole bytes
        if k == 0 or float(gain.topk(k).values.sum()) <= threshold * (k * (N + 16) + 16 * N + K):
            break
        counts.append(k)
        most = k
    return counts


def update_scales(s: Planes, TH: Tensor, H: Tensor) -> Planes:
    """Row and column scales of one plane after the other, each exact for the others as they are.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
    """
    planes = list(s.planes)
    sets = [torch.arange(H.shape[0], device=H.device), *s.columns]
    G = TH - s.dense() @ H
    for p, columns in enumerate(sets):
        whole = len(columns) == H.shape[0]
        rows, H_ss = (H, H) if whole else (H[columns], H[columns][:, columns])
        # The plane's own problem has the same form: the product of its target and H is G with the plane taken out.
        right = G[:, columns] + planes[p].dense() @ H_ss
        new = update_column_scales(update_row_scales(planes[p], right, H_ss), right, H_ss)
        if p < len(planes) - 1:
            G -= (new.dense() - planes[p].dense()) @ rows
        planes[p] = new
    return Planes(planes, s.columns)


def update_codes(
    s: Planes, TH: Tensor, H: Tensor, *, sweeps: int = 1, inner: int = INNER, outer: int = OUTER
) -> Planes:
    """Coordinate descent on all codes of a weight at once; see `descent.descend_columns` for the panels.

    With planes of falling size (each at least the sum of those behind it) signs taken one after the other give the
    nearest level; where scales are otherwise they may not, so a step is made only if it comes nearer.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
        sweeps: passes.
        inner: columns of a panel that every step updates.
        outer: columns of a panel that every inner panel updates.
    """
    N, K = TH.shape
    sets = [torch.arange(K, device=H.device), *s.columns]
    # (Q, K, N): signed weights of every plane; zero where a column does not have the plane
    parts = torch.zeros(len(sets), K, N, device=H.device)
    for part, plane, columns in zip(parts, s.planes, sets, strict=True):
        part[columns] = plane.dense().T
    before, size = parts.clone(), parts.abs()
    depth = [0] * K
    for columns in s.columns:
        for j in columns.tolist():
            depth[j] += 1
    W = parts.sum(0)
    G = TH.T - H @ W
    over = 1 / H.diagonal().clamp_min(1e-30)

    def step(j: int, weights: Tensor, residual: Tensor, out: Tensor) -> None:
        way = residual * over[j]  # from the weight to the best value
        rest = weights + way
        chosen = []
        for p in range(depth[j] + 1):
            chosen.append(torch.copysign(size[p, j], rest))
            rest = rest - chosen[-1]
        nearer = rest.abs() < way.abs()
        for p, code in enumerate(chosen):
            parts[p, j] = torch.where(nearer, code, parts[p, j])
        torch.sum(parts[: depth[j] + 1, j], 0, out=out)

    for _ in range(sweeps):
        W = descend_columns(W, G, H, step, inner=inner, outer=outer)
    planes = []
    for old, part, plane, columns in zip(before, parts, s.planes, sets, strict=True):
        flipped = (old[columns] * part[columns] < 0).T
        planes.append(RowColumn(plane.r, plane.c, torch.where(flipped, -plane.B, plane.B)))
    return Planes(planes, s.columns)


def most_columns(N: int, K: int, bits: float) -> list[int]:
    """The most columns of an (N, K) weight that may have a second, third, ... plane within `bits` true bits.

    Raises:
        LitBinqError: not even the first plane fits.
    """
    available = bits * N * K + 1e-6
    if stored_bits(N, K, []) > available:
        raise LitBinqError(
            f"closed_form.bits: got {bits:.4f} for a {N} x {K} layer, expected at least "
            f"{stored_bits(N, K, []) / (N * K):.4f}: its signs and scales alone take that much"
        )
    counts: list[int] = []
    for _ in range(MOST_PLANES - 1):
        # The size rises with k but for the bitmap, which k = K does without.
        most = counts[-1] if counts else K
        k = next((k for k in range(most, 0, -1) if stored_bits(N, K, [*counts, k]) <= available), 0)
        if k == 0:
            break
        counts.append(k)
        if k < K:
            break
    return counts
