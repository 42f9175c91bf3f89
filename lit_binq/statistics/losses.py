"""Losses for tuning: relative block error and the divergence of the model's next-token distributions.

Legend: y (b, T, d) full-precision block output, y^ its quantized counterpart; p teacher, q student distribution.
"""

from typing import Any, Literal

import torch
from torch import Tensor

BlockLoss = Literal["token", "block", "channel", "whitened"]


def block_errors(y_hat: Tensor, y: Tensor, kind: BlockLoss, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the relative squared error of a block's output.

    `block`: sum |y^ - y|^2 over sum |y|^2, as papers define it. A few tokens with massive activations rule it: their
    norm is hundreds of times the others', so neither the gradient nor early stopping sees an ordinary token.
    `token`: the relative error of each token, summed, over the number of tokens. A norm layer comes next in every
    pre-norm model and keeps directions only, so this is what the next block feels. Ours.
    `channel`, `whitened`: `token` after `metric` was applied to y^ - y and to y (lit_binq.calibration.block_loss).

    Args:
        y_hat: (b, T, d).
        y: (b, T, d).
        kind: which of them.
        metric: (d,) or (d, d) symmetric, for the last two.

    Returns:
        Two float32 scalars; sums over batches may be added up before they are divided.
    """
    error, norm = y_hat.float() - y, y.float()
    if kind in ("channel", "whitened"):
        if metric is None:
            raise ValueError(f"block_errors: kind {kind!r} needs a metric")
        error, norm = _apply(metric, error), _apply(metric, norm)
    error, norm = error.square(), norm.square()
    if kind == "block":
        return error.sum(), norm.sum()
    norms = norm.sum(-1)
    ratio = error.sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return ratio.sum(), torch.full((), float(norms.numel()), device=y.device)


def _apply(metric: Tensor, t: Tensor) -> Tensor:
    """`metric` (d,) or (d, d) symmetric times the tokens of t (b, T, d), in float32 also under autocast."""
    with torch.autocast(t.device.type, enabled=False):
        return t * metric if metric.dim() == 1 else t @ metric


def kl_divergence(student: Tensor, teacher: Tensor, positions: int = 1024) -> Tensor:
    """Mean over tokens of KL(p || q) in nats.

    The gradient with respect to the student's logits is (q - p) / tokens: it is computed in the same pass, and logits
    are widened to float32 only `positions` tokens at a time. A vocabulary of 49k makes 1.6 GB of float32 logits from 8k
    tokens, and automatic differentiation would keep several such tensors.

    Args:
        student: (b, T, V) logits.
        teacher: (b, T, V) logits; no gradient flows into them.
        positions: tokens widened at a time.
    """
    return _KL.apply(student.flatten(0, 1), teacher.detach().flatten(0, 1), positions)


class _KL(torch.autograd.Function):
    """Mean KL divergence of rows of logits (tokens, V), with its gradient made forward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, positions: int) -> Tensor:
        tokens = len(student)
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for part in range(0, tokens, positions):
            rows = slice(part, part + positions)
            log_q = torch.log_softmax(student[rows].float(), -1)
            log_p = torch.log_softmax(teacher[rows].float(), -1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            if gradient is not None:
                gradient[rows] = log_q.exp_() - p
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.tokens = tokens
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # Divided only now, after a loss scale has been multiplied in: float16 ends at 6e-8.
        return gradient * (grads[0] / ctx.tokens), None, None
