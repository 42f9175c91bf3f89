"""What a block's tuning minimises, and what its epochs are judged by: one definition for steps and for scores.

Legend: y (b, T, d) full-precision block output, y^ its quantized counterpart; G(y) = U U^T (T, T) the similarities of a
window's tokens, U (T, d) their directions.

    mean over tokens of |y^ - y|^2 / |y|^2  +  interaction * mean over windows of |G(y^) - G(y)|_F^2 / T^2

Both terms are our treatment of anisotropic outputs, where a few tokens hold most of the energy and a plain squared
error sees nothing else.

Runs inside CUDA graphs: shapes are static, nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_binq.diagnostics.similarity import token_error_sums


@dataclass
class BlockCriterion:
    """The loss of a block's output.

    Attributes:
        interaction: weight of the token-interaction term.
    """

    interaction: float = 0.0

    def sums(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator, float32 scalars; sums over batches may be added up before they are divided.

        Args:
            y_hat: (b, T, d).
            y: (b, T, d).
        """
        error, tokens = token_error_sums(y_hat, y)
        if self.interaction:
            # A window's share of the denominator is its tokens.
            error = error + self.interaction * float(y.shape[1]) * interaction_errors(y_hat, y)
        return error, tokens

    def loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, a float32 scalar; arguments as in `sums`."""
        error, tokens = self.sums(y_hat, y)
        return error / tokens


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
