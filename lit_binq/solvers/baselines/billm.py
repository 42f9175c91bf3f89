"""BiLLM: salient columns binarized twice, all other weights in two magnitude groups, errors fed on between blocks.

Legend: T (N, K) target, H (K, K) metric; U the upper Cholesky factor of the damped H's inverse; P the saliency.

    For each block of 128 columns, from left to right:
    1. P = w^2 / U_jj^2.
    2. The number of salient columns (1 to 49) and the magnitude split (81 quantiles) are searched on P
       (lit_binq.solvers.baselines.zones).
    3. Each part of w is binarized with row mean and mean |w - m|, the salient one twice.
    4. The errors e_j = (w_j - w^_j) / U_jj go to all later blocks, w_k <- w_k - e_j U_jk. Inside the block nothing is
       compensated, so that, unlike in GPTQ, what later blocks get is not their best continuation.

Source: arXiv 2402.04291, as its authors' code does it. Deviations: a weight that equals its mean takes the level
above it rather than the mean itself, which two bits could not store; a last block narrower than the others tries
fewer salient columns where it has to. What it is given is (T, H): the published setting is `objective: pseudo_target`
with `shrinkage: 0` and `clip_tokens: false`.

True bits: 2 for the codes, 8 levels a row and block, a bitmap: 3.0 at 4096 x 4096, more where K is no multiple of 128
(3.11 at K = 576). Stored as means and sizes (m1, a1, m2, a2; m, a1, a2) it would be 2.88; the 1.06 to 1.11 bits that
are quoted for it count neither the group bits nor the scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.baselines.zones import Levels, fit_parts, large_weights, salient_columns
from lit_binq.statistics.error_feedback import inverse_factor

DAMPING = 0.01
"""Share of the metric's mean diagonal that is added to it before it is inverted."""


@dataclass
class BiLLM(Solver):
    """Options of BiLLM.

    Attributes:
        block: columns a block, and a group of levels.
    """

    deployable: ClassVar[bool] = False
    block: int = 128

    def __post_init__(self) -> None:
        if self.block < 1:
            raise LitBinqError(f"solver.block: got {self.block}, expected at least 1 column")

    def solve(self, problem: Problem) -> Levels:
        """Fit levels with two zones; see the base class."""
        T, H = problem.finite()
        return block_by_block(T, inverse_factor(H, DAMPING), self._fit, width=self.block)

    def _fit(self, w: Tensor, price: Tensor) -> Levels:
        return self._fit_zones(w, *zones(w.square() * price))

    def _fit_zones(self, w: Tensor, salient: Tensor, large: Tensor) -> Levels:
        """Levels of a block w (N, b) with salient columns (b,) and large weights (N, b)."""
        return fit_parts(w, salient, large, iterations=0, means=True, column_scales=False)


def zones(P: Tensor) -> tuple[Tensor, Tensor]:
    """Salient columns (b,) and large weights (N, b) of a block with saliency P (N, b)."""
    salient = salient_columns(P)
    return salient, large_weights(P, salient)


def block_by_block(T: Tensor, U: Tensor, fit: Callable[[Tensor, Tensor], Levels], *, width: int) -> Levels:
    """Quantize blocks of columns from left to right; a block's error is compensated on the blocks after it.

    As the authors' code does it: see the head of this file.

    Args:
        T: (N, K).
        U: (K, K), see `lit_binq.statistics.error_feedback`.
        fit: from a block w (N, b) and 1 / U_jj^2 (b,) to its levels, one group of two zones.
        width: columns a block.

    Returns:
        Levels with two zones and groups of `width` columns.
    """
    W, K, parts = T.clone(), T.shape[1], []
    price = U.diagonal().square().reciprocal()
    for begin in range(0, K, width):
        end = min(begin + width, K)
        w = W[:, begin:end]
        parts.append(fit(w, price[begin:end]))
        if end < K:
            errors = (w - parts[-1].dense()) / U.diagonal()[begin:end]
            W[:, end:].addmm_(errors, U[begin:end, end:], alpha=-1)
    scales = [part.c for part in parts if part.c is not None]
    salient = torch.cat([part.salient for part in parts])
    return Levels(
        torch.cat([part.levels for part in parts], 1),
        torch.cat([part.codes for part in parts], 1),
        width,
        salient,
        torch.cat(scales) if scales else None,
    )
