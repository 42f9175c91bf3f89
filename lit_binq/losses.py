"""Losses for tuning: relative block error and the divergence of the model's next-token distributions.

Legend: y (b, T, d) full-precision block output, y^ its quantized counterpart; p teacher, q student distribution.
"""

from typing import Literal

import torch
from torch import Tensor

BlockLoss = Literal["token", "block"]


def block_errors(y_hat: Tensor, y: Tensor, kind: BlockLoss) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the relative squared error of a block's output.

    `block`: sum |y^ - y|^2 over sum |y|^2, as papers define it. A few tokens with massive activations rule it: their
    norm is hundreds of times the others', so neither the gradient nor early stopping sees an ordinary token.
    `token`: the relative error of each token, summed, over the number of tokens. A norm layer comes next in every
    pre-norm model and keeps directions only, so this is what the next block feels. Ours.

    Args:
        y_hat: (b, T, d).
        y: (b, T, d).
        kind: which of the two.

    Returns:
        Two float32 scalars; sums over batches may be added up before they are divided.
    """
    error, norm = (y_hat.float() - y).square(), y.float().square()
    if kind == "block":
        return error.sum(), norm.sum()
    norms = norm.sum(-1)
    ratio = error.sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return ratio.sum(), torch.full((), float(norms.numel()), device=y.device)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(p || q) in nats.

    Args:
        student: (b, T, V) logits.
        teacher: (b, T, V) logits; no gradient flows into them.
    """
    log_q = torch.log_softmax(student.float(), -1).flatten(0, 1)
    log_p = torch.log_softmax(teacher.detach().float(), -1).flatten(0, 1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
