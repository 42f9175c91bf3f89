"""The divergence of the model's next-token distributions: what the model stage minimises.

Legend: p teacher, q student distribution.
"""

from typing import Any

import torch
from torch import Tensor


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
