"""Objectives: from activation statistics to the pair (T, H) that every solver minimises.

Legend (orientation of nn.Linear):
    W (N, K)   full-precision weight;  W^ the quantized weight
    x (K,)     the layer's input in the full-precision stream,  x~ (K,) its input in the quantized stream
    S = E[x~ x~^T],  C = E[x x~^T],  F = E[x x^T]      (K, K) Grams over calibration tokens
    T (N, K)   target,  H (K, K) metric:  every objective is  tr((T - W^) H (T - W^)^T) + const

Source: arXiv 2512.21651 (output alignment). The shrinkage towards the identity, lambda * mean(diag S), is ours:
an unshrunk Gram is ruled by a few massive-activation directions and the fit gives up all the others.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError

log = logging.getLogger(__name__)

Objective = Literal["weight", "naive_output", "pseudo_target", "true_target"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


@dataclass
class Statistics:
    """Gram matrices of one linear group, averaged over tokens.

    Attributes:
        S: (K, K) float32, quantized stream.
        C: (K, K) float32, full-precision against quantized stream.
        F: (K, K) float32, full-precision stream.
        tokens: number of tokens seen, over all ranks.
    """

    S: Tensor
    C: Tensor
    F: Tensor
    tokens: int


class GramAccumulator:
    """Accumulates S, C and F batch by batch, in float32, without keeping activations.

    Args:
        features: K.
        device: where the sums live.
        objective: which Grams are needed; the others stay zero and cost nothing.
    """

    def __init__(self, features: int, device: torch.device, objective: Objective) -> None:
        self.S = torch.zeros(features, features, device=device)
        self.C = torch.zeros_like(self.S)
        self.F = torch.zeros_like(self.S)
        self.tokens = 0
        self._S = objective in ("pseudo_target", "true_target")
        self._C = objective == "true_target"
        self._F = objective == "naive_output"

    def add(self, x: Tensor, x_tilde: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: (..., K), full-precision stream.
            x_tilde: (..., K), quantized stream, token by token in the same order.
            weights: (tokens,) non-negative weight of each token, or None for all alike.
        """
        x, x_tilde = (t.reshape(-1, t.shape[-1]).float() for t in (x, x_tilde))
        self.tokens += len(x)
        if weights is not None:
            x, x_tilde = (t * weights.sqrt()[:, None] for t in (x, x_tilde))
        if self._S:
            self.S.addmm_(x_tilde.T, x_tilde)
        if self._C:
            self.C.addmm_(x.T, x_tilde)
        if self._F:
            self.F.addmm_(x.T, x)

    def statistics(self) -> Statistics:
        """Averages over all tokens of all ranks.

        Raises:
            LitBinqError: no token was added, or a sum is not finite.
        """
        count = torch.tensor(self.tokens, device=self.S.device)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            for t in (self.S, self.C, self.F, count):
                torch.distributed.all_reduce(t)
        return self._averages(int(count))

    def own_statistics(self) -> Statistics:
        """The same over this rank's tokens alone; no other rank need take part."""
        return self._averages(self.tokens)

    def _averages(self, n: int) -> Statistics:
        if n == 0:
            raise LitBinqError("statistics: got no calibration tokens, expected at least one window a rank")
        if not all(torch.isfinite(t).all() for t in (self.S, self.C, self.F)):
            raise LitBinqError(
                "statistics: activations hold NaN or inf (or overflow float32); expected finite activations: "
                "check the checkpoint, or calibrate with `trainer.precision: 32-true`"
            )
        return Statistics(self.S / n, self.C / n, self.F / n, n)


def check_options(objective: str, shrinkage: float) -> None:
    """Raise LitBinqError for an unknown objective or a shrinkage that is negative or not finite."""
    if objective not in OBJECTIVES:
        raise LitBinqError(f"objective: got {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if not 0 <= shrinkage < math.inf:
        raise LitBinqError(f"shrinkage: got {shrinkage}, expected a finite number >= 0")


def target_and_metric(
    W: Tensor, stats: Statistics | None, *, objective: Objective, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """The target T and the metric H of an objective.

    weight: T = W, H = I. naive_output: T = W, H = F + d I. pseudo_target (ARB-X): T = W, H = S + d I.
    true_target (output alignment): H = S + d I, T = W (C + d I) H^-1.
    d = shrinkage * mean(diag H before shrinkage).

    The system is solved in float64. Where H is not positive definite (shrinkage 0 and dead or collinear
    inputs) the damping grows tenfold until it is, and the log says so.

    Args:
        W: (N, K) float.
        stats: Grams; None is allowed for the objective "weight".
        objective: one of `OBJECTIVES`.
        shrinkage: lambda >= 0; 0 is the paper's form.

    Returns:
        T (N, K) and H (K, K), float32, on W's device.

    Raises:
        LitBinqError: unknown objective, negative shrinkage, or no damping makes H positive definite.
    """
    check_options(objective, shrinkage)
    if stats is None and objective != "weight":
        raise ValueError(f"objective {objective!r} needs statistics")
    W = W.detach().float()
    identity = torch.eye(W.shape[1], device=W.device)
    if stats is None or objective == "weight":
        return W, identity
    gram = stats.F if objective == "naive_output" else stats.S
    mean = float(gram.diagonal().mean())
    if mean <= 0:  # the input is zero throughout: any weight gives the same output, so stay at the weights
        return W, identity
    L, damping = _cholesky(gram, shrinkage, mean)
    H = gram + damping * identity
    if objective != "true_target":
        return W, H
    right = (W.double() @ stats.C.double() + damping * W.double()).T
    return torch.cholesky_solve(right, L).T.float(), H


def _cholesky(gram: Tensor, shrinkage: float, mean: float) -> tuple[Tensor, float]:
    """Float64 Cholesky factor of gram + damping I, with the least damping >= shrinkage * mean that allows it."""
    attempt, last = shrinkage, max(shrinkage, 1e3)
    while attempt <= last:
        damped = gram.double()
        damped.diagonal().add_(attempt * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        # A factorisation may succeed with pivots that are rounding noise of the float32 sums, up to 1.5e-6 of the
        # diagonal entry: such a solve returns garbage.
        if int(info) == 0 and bool((L.diagonal().square() > 4e-6 * damped.diagonal()).all()):
            if attempt != shrinkage:
                log.warning("singular Gram: shrinkage raised from %g to %g for this layer", shrinkage, attempt)
            return L, attempt * mean
        attempt = max(attempt * 10, 1e-6)
    raise LitBinqError(
        f"singular Gram matrix: no shrinkage from {shrinkage} to {last:g} made it positive definite; "
        "expected activations that vary: give more calibration text"
    )
