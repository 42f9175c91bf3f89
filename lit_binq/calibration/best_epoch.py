"""The epoch of a stage that is kept, and when a stage is over."""

import torch
from torch import nn


class BestEpoch:
    """Keeps a copy of the parameters where the score was lowest; epoch 0 is before the first step.

    Args:
        parameters: what the stage trains; empty for a stage without tuning.
        score: loss before the first step.
        epochs: most epochs.
        patience: epochs without a lower score after which the stage is over; 0 means never early.

    Attributes:
        before: the score of epoch 0.
        score: the lowest score.
        kept: the epoch it belongs to.
        epoch: epochs that were scored.
    """

    def __init__(self, parameters: list[nn.Parameter], score: float, epochs: int, patience: int) -> None:
        self.parameters, self.epochs, self.patience = parameters, epochs, patience
        self.before = self.score = score
        self.epoch = self.kept = 0
        self._copy()

    def _copy(self) -> None:
        self._state = [p.detach().clone() for p in self.parameters]

    def add(self, score: float) -> bool:
        """Score an epoch; whether the stage is over. NaN is never the best."""
        self.epoch += 1
        if score < self.score:
            self.score, self.kept = score, self.epoch
            self._copy()
        return self.epoch >= self.epochs or bool(self.patience and self.epoch - self.kept >= self.patience)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept values back into the parameters."""
        for p, best in zip(self.parameters, self._state, strict=True):
            p.copy_(best)
