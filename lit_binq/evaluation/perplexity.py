"""The perplexity of a model, as a metric.

Legend: b windows, T positions, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenPerplexity(Metric):
    """exp of the mean negative log-likelihood a token, each window's first token being given.

    Sums are kept in float64 over all batches and, at `compute`, over all ranks: every token weighs the same
    however windows fall into batches and ranks.

    Args:
        positions: positions whose logits are widened to float32 at a time; bounds the extra memory to
            2 x b x positions x V x 4 bytes.
        options: for torchmetrics.Metric.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, positions: int = 128, **options: Any) -> None:
        super().__init__(**options)
        self.positions = positions
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, input_ids: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (b, T, V), any floating-point dtype; position t predicts token t + 1.
            input_ids: (b, T) int64.

        Raises:
            ValueError: the shapes do not belong together, or there is nothing to predict.
        """
        if logits.shape[:-1] != input_ids.shape or input_ids.dim() != 2 or input_ids.shape[1] < 2:
            raise ValueError(
                f"TokenPerplexity: got logits {tuple(logits.shape)} and input_ids {tuple(input_ids.shape)}, "
                "expected (b, T, V) and (b, T) with T >= 2"
            )
        last = input_ids.shape[1] - 1
        for start in range(0, last, self.positions):
            stop = min(start + self.positions, last)
            part = logits[:, start:stop].float().flatten(0, 1)  # (b * positions, V)
            target = input_ids[:, start + 1 : stop + 1].flatten().to(part.device)
            nll = torch.nn.functional.cross_entropy(part, target, reduction="none")
            self.nll += nll.sum(dtype=torch.float64)
        self.tokens += last * input_ids.shape[0]

    def compute(self) -> Tensor:
        """() float64: the perplexity; NaN when no token was seen."""
        return torch.exp(self.nll / self.tokens)
