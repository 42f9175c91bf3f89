"""Salient columns: a row x column plane, and a second one on the columns that the objective gains most from.

Legend: T (N, K) target, H (K, K) metric; W1 (N, K) first plane, W2 (N, k) second plane on the columns s, so that
W^ = W1 + W2 P (lit_binq.formats.salient); R = T - W1 the residual, G = R H.

    1. W1 by the row x column solver.
    2. A column's gain: adding e_j at column j lowers f by 2 e_j . G_j - |e_j|^2 H_jj. The best e_j = a sign(G_j) with
       one size a for all rows gains |G_j|_1^2 / (N H_jj). The k columns with the largest gain are chosen.
    3. W2 is again a row x column problem: with the rest fixed, f = tr((T2 - W2) H_ss (T2 - W2)^T) + const with
       T2 = R H_:s H_ss^-1.
    4. W1 and W2 take turns, each from where it stands, so f never rises.

Ours. The idea of a second plane on salient columns is BiLLM's (arXiv 2402.04291, residual approximation); here
columns, codes and scales all follow one objective, and the columns are whole columns of the matrix.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.row_column import RowColumn
from lit_binq.formats.salient import Salient, stored_bits
from lit_binq.solvers.base import Solver, require_finite
from lit_binq.solvers.row_column import RowColumnSolver, start


@dataclass
class SalientSolver(Solver):
    """Options of the salient format.

    Attributes:
        share: share of the columns that get a second plane, where no bit budget says how many.
        turns: how often the two planes are fitted in turn after the first fit.
        plane: options of the fit of one plane.
    """

    takes_bits: ClassVar[bool] = True

    share: float = 0.1
    turns: int = 1
    plane: RowColumnSolver = field(default_factory=RowColumnSolver)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise LitBinqError(f"solver.share: got {self.share}, expected a share from 0 to 1")
        if self.turns < 0:
            raise LitBinqError(f"solver.turns: got {self.turns}, expected a number >= 0")

    def solve(self, T: Tensor, H: Tensor, *, bits: float | None = None) -> Salient | RowColumn:
        """Fit both planes, float32; without a chosen column the result is a plain row x column weight."""
        require_finite(T, H)
        base = self.plane.solve(T, H)
        N, K = T.shape
        k = round(self.share * K) if bits is None else most_columns(N, K, bits)
        if k == 0:
            return base
        columns = choose_columns((T - base.dense()) @ H, H, k)
        W2 = _second(T - base.dense(), H, columns, self.plane, None)
        for _ in range(self.turns):
            rest = T.index_add(1, columns, W2.dense(), alpha=-1)
            base = self.plane.fit(rest, H, base)
            W2 = _second(T - base.dense(), H, columns, self.plane, W2)
        return Salient(base, W2, columns)

    def spend(self, weights: dict[str, Tensor], moments: dict[str, Tensor], bits: float) -> dict[str, float]:
        """Second planes where they lower the layers' relative output errors most for each bit.

        The gain of a column is that of `choose_columns` with the weight's own rank-one fit for W1 and a diagonal
        metric, over the layer's output energy: every layer's relative error counts the same. One threshold on gain /
        bits for all layers, found by bisection.

        Args:
            weights: W (N, K) of every layer, by name.
            moments: E[x_j^2] (K,) of every layer's input.
            bits: true bits a weight, over all layers.

        Raises:
            LitBinqError: not even the first planes fit.
        """
        gains = {name: _gains(W.float(), moments[name].to(W.device).float()) for name, W in weights.items()}
        total = sum(W.numel() for W in weights.values())

        def chosen(threshold: float) -> dict[str, int]:
            counts = {}
            for name, W in weights.items():
                N, K = W.shape
                k = int((gains[name] > threshold * (N + 16)).sum())
                k = min(-(-k // 8) * 8, K)  # codes are packed to whole bytes
                fixed = 16 * N + K  # row scales and bitmap, whatever k
                counts[name] = k if float(gains[name].topk(k).values.sum()) > threshold * (k * (N + 16) + fixed) else 0
            return counts

        def size(counts: dict[str, int]) -> float:
            return sum(_stored(W, counts[name]) for name, W in weights.items()) / total

        if (least := size(dict.fromkeys(weights, 0))) > bits:
            raise LitBinqError(
                f"closed_form.bits: got {bits}, expected at least {least:.4f}: signs and scales of the first plane "
                "alone take that much"
            )
        low, high = (
            0.0,
            max(float(g.max()) / (len(W) + 16) for g, W in zip(gains.values(), weights.values(), strict=True)),
        )
        if size(chosen(low)) > bits:
            for _ in range(60):  # the size falls with the threshold; `high` always fits
                middle = (low + high) / 2
                low, high = (middle, high) if size(chosen(middle)) > bits else (low, middle)
        else:
            high = low
        counts = chosen(high)
        # A layer's row scales come all at once, so the threshold may leave a gap: layer by layer, the best first.
        left = int(bits * total) - sum(_stored(W, counts[name]) for name, W in weights.items())
        following = {
            n: float(gains[n].sort(descending=True).values[min(k, len(gains[n]) - 1)]) for n, k in counts.items()
        }
        for name in sorted(counts, key=lambda n: following[n] / (len(weights[n]) + 16), reverse=True):
            W, before = weights[name], _stored(weights[name], counts[name])
            counts[name] = max(counts[name], most_columns(W.shape[0], W.shape[1], (before + left) / W.numel()))
            left -= _stored(W, counts[name]) - before
        return {name: _stored(W, counts[name]) / W.numel() for name, W in weights.items()}


def _stored(W: Tensor, k: int) -> int:
    return stored_bits(W.shape[0], W.shape[1], k)


def _gains(W: Tensor, moment: Tensor) -> Tensor:
    """(K,) relative output error that a second plane takes away, by column: m_j |R_j|_1^2 / N over sum m_j |W_j|^2."""
    R = W - start(W, 10).dense()
    return moment * R.abs().sum(0).square() / len(W) / (moment * W.square().sum(0)).sum().clamp_min(1e-30)


def _second(R: Tensor, H: Tensor, columns: Tensor, plane: RowColumnSolver, begin: RowColumn | None) -> RowColumn:
    """The second plane (N, k) for the residual R (N, K)."""
    H_ss = H[columns][:, columns]
    # H is damped, so H_ss is positive definite; float64 as in the objectives.
    L = torch.linalg.cholesky(H_ss.double())
    T2 = torch.cholesky_solve((R @ H[:, columns]).double().T, L).T.float()
    return plane.fit(T2, H_ss, begin)


def choose_columns(G: Tensor, H: Tensor, k: int) -> Tensor:
    """(k,) int64, ascending: the columns with the largest gain |G_j|_1^2 / H_jj.

    Args:
        G: (N, K), residual times metric.
        H: (K, K).
        k: how many, from 0 to K.
    """
    gain = G.abs().sum(0).square() / H.diagonal().clamp_min(1e-30)
    return gain.topk(k).indices.sort().values


def most_columns(N: int, K: int, bits: float) -> int:
    """The most columns of an (N, K) weight that may have a second plane within `bits` true bits.

    Raises:
        LitBinqError: not even the first plane fits.
    """
    available = bits * N * K
    if stored_bits(N, K, 0) > available:
        raise LitBinqError(
            f"closed_form.bits: got {bits:.4f} for a {N} x {K} layer, expected at least "
            f"{stored_bits(N, K, 0) / (N * K):.4f}: its signs and scales alone take that much"
        )
    # The size rises with k but for the bitmap, which k = K does without.
    return next((k for k in range(K, 0, -1) if stored_bits(N, K, k) <= available), 0)
