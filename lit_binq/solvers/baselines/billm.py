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
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.solvers.base import Solver, require_finite
from lit_binq.solvers.baselines.zones import Levels, fit_parts, large_weights, salient_columns
from lit_binq.statistics.error_feedback import inverse_factor


@dataclass
class BiLLM(Solver):
    """Options of BiLLM.

    Attributes:
        block: columns a block, and a group of levels.
        damping: share of the metric's mean diagonal added to it before it is inverted.
        saliency: `hessian` (w^2 / U_jj^2) or `magnitude` (w^2).
        feedback: whether a block's error is compensated on later blocks.
    """

    deployable: ClassVar[bool] = False
    block: int = 128
    damping: float = 0.01
    saliency: Literal["hessian", "magnitude"] = "hessian"
    feedback: bool = True

    def __post_init__(self) -> None:
        check_block_options(self.block, self.damping)
        if self.saliency not in ("hessian", "magnitude"):
            raise LitBinqError(f"solver.saliency: got {self.saliency!r}, expected `hessian` or `magnitude`")

    def solve(self, T: Tensor, H: Tensor, *, bits: float | None = None) -> Levels:
        """Fit levels with two zones, float32; see the base class. Its size is fixed: `bits` says nothing here."""
        require_finite(T, H)
        return block_by_block(T, inverse_factor(H, self.damping), self._fit, width=self.block, feedback=self.feedback)

    def _zones(self, w: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """Salient columns (b,) and large weights (N, b) of a block."""
        P = w.square() if self.saliency == "magnitude" else w.square() * price
        salient = salient_columns(P)
        return salient, large_weights(P, salient)

    def _fit(self, w: Tensor, price: Tensor) -> Levels:
        salient, large = self._zones(w, price)
        return fit_parts(w, salient, large, iterations=0, means=True, column_scales=False)


def check_block_options(block: int, damping: float) -> None:
    """Raise LitBinqError for a block without columns or a negative damping."""
    if block < 1:
        raise LitBinqError(f"solver.block: got {block}, expected at least 1 column")
    if not damping >= 0:
        raise LitBinqError(f"solver.damping: got {damping}, expected a number >= 0")


def block_by_block(
    T: Tensor, U: Tensor, fit: Callable[[Tensor, Tensor], Levels], *, width: int, feedback: bool
) -> Levels:
    """Quantize blocks of columns from left to right; a block's error is compensated on the blocks after it.

    Args:
        T: (N, K).
        U: (K, K), see `lit_binq.statistics.error_feedback`.
        fit: from a block w (N, b) and 1 / U_jj^2 (b,) to its levels, one group of two zones.
        width: columns a block.
        feedback: whether errors are compensated, as the authors' code does it: see the head of this file.

    Returns:
        Levels with two zones and groups of `width` columns.
    """
    W, K, parts = T.clone(), T.shape[1], []
    price = U.diagonal().square().reciprocal()
    for begin in range(0, K, width):
        end = min(begin + width, K)
        w = W[:, begin:end]
        parts.append(fit(w, price[begin:end]))
        if feedback and end < K:
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
