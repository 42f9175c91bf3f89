"""What a block's tuning minimises, and what its epochs are judged by: one definition for steps and for scores.

Legend: y (b, T, d) full-precision block output, y^ its quantized counterpart, e = y^ - y; u = y / |y| a token's
direction; M = E[u u^T] (d, d) over the training tokens; P the metric, applied to channels; G(y) = U U^T (T, T) the
similarities of a window's tokens, U (T, d) their directions.

All of these are our treatment of anisotropic outputs, where a few tokens, channels or directions hold most of the
energy and a plain squared error sees nothing else:

    block      sum |e|^2 / sum |y|^2
    token      mean over tokens of |e|^2 / |y|^2
    channel    mean over tokens of |P e|^2 / |P y|^2,  P = diag(M + D)^(-1/2): every channel counts alike
    whitened   the same with P = (M + D)^(-1/2): every direction counts alike, in whatever basis
    + interaction * mean over windows of |G(y^) - G(y)|_F^2 / T^2

with D = DAMPING * mean(diag M) * I. `channel` is `whitened` without the correlations.

Runs inside CUDA graphs: shapes are static, nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.statistics.losses import BlockLoss, block_errors

DAMPING = 0.1
"""Share of the mean power per channel that is added to each: what has less power than that is mostly noise, and at one
bit it could not be met anyway. Largest amplification, over a channel of mean power: sqrt(1.1 / 0.1) = 3.3."""


@dataclass
class BlockCriterion:
    """The loss of a block's output.

    Attributes:
        kind: the error's kind, see above.
        mean_square: () mean of y^2 over the training windows, for `block`.
        metric: what `output_metric` made for this kind.
        interaction: weight of the token-interaction term.
    """

    kind: BlockLoss
    mean_square: Tensor
    metric: Tensor | None = None
    interaction: float = 0.0

    def sums(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator, float32 scalars; sums over batches may be added up before they are divided.

        Args:
            y_hat: (b, T, d).
            y: (b, T, d).
        """
        error, weight = block_errors(y_hat, y, self.kind, self.metric)
        if self.interaction:
            # A window's share of the denominator: its tokens, or for `block` the energy of an average window.
            share = y[0].numel() * self.mean_square if self.kind == "block" else float(y.shape[1])
            error = error + self.interaction * share * interaction_errors(y_hat, y)
        return error, weight

    def loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, a float32 scalar; arguments as in `sums`."""
        error, weight = self.sums(y_hat, y)
        # Over the whole block's norm rather than this batch's, so that steps weigh alike.
        return error / (self.mean_square * y.numel() if self.kind == "block" else weight)


def interaction_errors(y_hat: Tensor, y: Tensor) -> Tensor:
    """Sum over windows of |G(y^) - G(y)|_F^2 / T^2, a float32 scalar: token similarities that attention works with.

    In float32 also under autocast: similarities near 1 differ by less than bfloat16 resolves.

    Args:
        y_hat: (b, T, d).
        y: (b, T, d).
    """
    with torch.autocast(y.device.type, enabled=False):
        U_hat, U = _directions(y_hat.float()), _directions(y.float())
        difference = U_hat @ U_hat.mT - U @ U.mT  # (b, T, T)
        return difference.square().sum() / y.shape[1] ** 2


def _directions(y: Tensor) -> Tensor:
    """Tokens at unit length; a token of zeros stays zero and gets no gradient that is not finite."""
    return y * y.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


def output_metric(kind: BlockLoss, gram: Tensor) -> Tensor:
    """P for the kinds `channel` and `whitened`.

    Args:
        kind: one of the two.
        gram: (d, d) M, symmetric.

    Returns:
        (d,) factors of the channels for `channel`, (d, d) symmetric for `whitened`; float32. Ones where M is zero.

    Raises:
        LitBinqError: M is not finite.
    """
    if not torch.isfinite(gram).all():
        raise LitBinqError(
            "tuning.loss: the block's full-precision outputs hold NaN or inf, expected finite activations: check the "
            "checkpoint"
        )
    M = gram.double()
    mean = M.diagonal().mean()
    damping = torch.where(mean > 0, DAMPING * mean, 1.0)
    if kind == "channel":
        return (M.diagonal() + damping).rsqrt().float()
    powers, directions = torch.linalg.eigh(M)  # ascending; rounding may leave some slightly below zero
    return ((directions * (powers.clamp_min(0) + damping).rsqrt()) @ directions.mT).float()
