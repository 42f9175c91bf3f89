"""Losses for tuning: relative block error and the divergence of the model's next-token distributions.

Legend: y (b, T, d) full-precision block output, y^ its quantized counterpart; p teacher, q student distribution.
"""

import torch
from torch import Tensor


def block_loss(y_hat: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """mean (y^ - y)^2 / scale.

    Args:
        y_hat: (b, T, d).
        y: (b, T, d).
        scale: scalar, the mean of y^2 over all calibration windows, so that steps weigh alike.
    """
    return (y_hat.float() - y).square().mean() / scale


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(p || q) in nats.

    Args:
        student: (b, T, V) logits.
        teacher: (b, T, V) logits; no gradient flows into them.
    """
    log_q = torch.log_softmax(student.float(), -1).flatten(0, 1)
    log_p = torch.log_softmax(teacher.detach().float(), -1).flatten(0, 1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
