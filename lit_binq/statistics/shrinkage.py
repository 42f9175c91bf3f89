"""The shrinkage lambda of a linear group, chosen from data: the one whose weights do best on windows they were not
fitted on. Ours; no paper chooses it.

Legend: W (N, K) full-precision weight, A (N, K) the candidate that stands for it, x, x~ (K,) the layer's input in the
full-precision and the quantized stream; S, C, F their Grams and T, H target and metric as in
lit_binq.statistics.objectives.

The objective's own value cannot choose lambda, because lambda is a part of it, and because on the tokens it was fitted
on the least lambda is always the best. What is wanted is the true-target error on other tokens, and that needs no
second pass over activations. By |v|^2 = tr(v v^T) and linearity of the mean,

    E|W x - A x~|^2 = tr E[(W x - A x~)(W x - A x~)^T]
                    = tr(W E[x x^T] W^T) - tr(W E[x x~^T] A^T) - tr(A E[x~ x^T] W^T) + tr(A E[x~ x~^T] A^T)
                    = tr(W F W^T) - 2 tr(W C A^T) + tr(A S A^T),

where the two middle terms are transposes of each other, hence the same number. With weighted tokens the means, and so
the error, are weighted alike. A is either the target T(lambda) (`target`: ridge regression chosen by validation) or the
quantized weight fitted to (T, H)(lambda) (`quantized`). They differ: lambda also decides which errors the codes may
make, and one bit makes many, so a target that predicts well can be hard to hit. `quantized` judges what is stored, and
costs a solve for each lambda of the grid.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.statistics.objectives import Statistics

GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Half a decade apart: the error is flat around its minimum, a finer grid would follow the sampling error."""

ShrinkageBy = Literal["quantized", "target"]


@dataclass
class Choice:
    """A shrinkage, and what speaks for it.

    Attributes:
        shrinkage: the lambda with the least error; of equals the largest, which stays nearest to the weights.
        errors: relative true-target error on the validating tokens, averaged over the group's layers, by lambda.
    """

    shrinkage: float
    errors: dict[float, float]


def true_target_error(W: Tensor, A: Tensor, stats: Statistics) -> float:
    """E|W x - A x~|^2 over the tokens of `stats`, which must hold all three Grams.

    Args:
        W: (N, K) full-precision weight.
        A: (N, K) what stands for it.
        stats: (K, K) Grams.
    """
    W, A = W.double(), A.double()
    S, C, F = stats.S.double(), stats.C.double(), stats.F.double()
    return float(((W @ F) * W).sum() - 2 * ((W @ C) * A).sum() + ((A @ S) * A).sum())


def choose_shrinkage(
    weights: Mapping[str, Tensor], validating: Statistics, candidate: Callable[[str, float], Tensor]
) -> Choice:
    """The lambda of `GRID` that does best for a group of layers with one input.

    Each layer's error is taken relative to E|W x|^2, so that a layer with large outputs does not decide for all.
    Under DDP the first rank decides: ranks hold the same Grams, but their libraries may round differently.

    Args:
        weights: W (N, K) by name.
        validating: Grams, F too, over tokens that no candidate was fitted on.
        candidate: (name, lambda) to the (N, K) weight to be judged, fitted on other tokens.

    Raises:
        LitBinqError: whatever `candidate` raises, or an error that is finite for no lambda.
    """
    powers = {name: true_target_error(W, torch.zeros_like(W), validating) for name, W in weights.items()}
    live = [name for name, power in powers.items() if power > 0]  # the others put out zero, whatever stands for them
    sums = [
        sum(true_target_error(weights[n], candidate(n, value), validating) / powers[n] for n in live)
        / max(len(live), 1)
        for value in GRID
    ]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        shared = torch.tensor(sums, dtype=torch.float64, device=validating.S.device)
        torch.distributed.broadcast(shared, 0)
        sums = shared.tolist()
    finite = [(error, -value) for value, error in zip(GRID, sums, strict=True) if math.isfinite(error)]
    if not finite:
        raise LitBinqError(
            f"closed_form.shrinkage: no error is finite for any of {', '.join(map(str, GRID))}, expected finite "
            "weights and activations: check the checkpoint, or give a number instead of auto"
        )
    return Choice(-min(finite)[1], dict(zip(GRID, sums, strict=True)))


def split(train: int, held_out: int) -> tuple[slice, slice]:
    """Windows to fit candidates on, and windows to judge them on.

    The held-out windows judge where there are any; candidates are then fitted on all training windows, as the weight
    is in the end. Otherwise the second half of the training windows judges the first: halves rather than every other
    window, because neighbours often come from one document. Half the tokens ask for somewhat more shrinkage than all.

    Args:
        train: number of training windows of this rank, which come first.
        held_out: number of held-out windows behind them.

    Raises:
        LitBinqError: one training window and none held out.
    """
    if held_out:
        return slice(0, train), slice(train, train + held_out)
    if train < 2:
        raise LitBinqError(
            f"closed_form.shrinkage: got auto with {train} training windows a process and none held out, expected two "
            "or more: raise `data.windows` or `data.held_out`, or give a number"
        )
    return slice(0, train // 2), slice(train // 2, train)


def pooled(a: Statistics, b: Statistics) -> Statistics:
    """Statistics over the tokens of both; a Gram that one of them lacks is meaningless in the result."""
    n = a.tokens + b.tokens
    mine, other = a.tokens / n, b.tokens / n
    return Statistics(mine * a.S + other * b.S, mine * a.C + other * b.C, mine * a.F + other * b.F, n)
