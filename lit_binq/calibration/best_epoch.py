"""The epoch of a stage that is kept, and when a stage is over."""

import torch
from torch import nn


class BestEpoch:
    """Keeps a copy of the parameters where the score was lowest; epoch 0 is before the first step.

    The copy is in host memory, for the device has none to spare in the model stage. A GPU's goes through pinned memory
    and waits for nothing: what steps and copies enqueue runs in their order.

    Args:
        parameters: what the stage trains; empty for a stage without tuning.
        score: loss before the first step.
        epochs: how many there are.

    Attributes:
        before: the score of epoch 0.
        score: the lowest score.
        kept: the epoch it belongs to.
        epoch: epochs that were scored.
    """

    def __init__(self, parameters: list[nn.Parameter], score: float, epochs: int) -> None:
        self.parameters, self.epochs = parameters, epochs
        self.before = self.score = score
        self.epoch = self.kept = 0
        self._state = [torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda) for p in parameters]
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for best, p in zip(self._state, self.parameters, strict=True):
            best.copy_(p, non_blocking=True)

    def add(self, score: float) -> bool:
        """Score an epoch; whether the stage is over. NaN is never the best."""
        self.epoch += 1
        if score < self.score:
            self.score, self.kept = score, self.epoch
            self._copy()
        return self.epoch >= self.epochs

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept values back into the parameters."""
        for p, best in zip(self.parameters, self._state, strict=True):
            p.copy_(best, non_blocking=True)
