"""What every stage of a calibration promises. The LightningModule decides only which one is on.

A block stage (block_stage.py) quantizes one decoder block; the model stage (model_stage.py), last, tunes the whole.
Stages never step an optimizer themselves.

Knows nothing of Lightning.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.calibration.workspace import Workspace
from lit_binq.formats import LatentLinear
from lit_binq.models.blocks import find_layers, norm_parameters


class Stage(ABC):
    """One step of the calibration: `enter`, then any number of `loss` steps, then `leave`.

    Args:
        work: the shared workspace.
        tuning: how this stage is tuned.

    Attributes:
        activation_bits: of the inputs of each linear layer, averaged over its columns, where they are quantized.
        ask: called between groups of a closed form; raises where the fit is to stop.
    """

    title: str
    module: nn.Module

    def __init__(self, work: Workspace, tuning: BlockTuning | ModelTuning) -> None:
        self.work, self.tuning = work, tuning
        self.activation_bits: dict[str, float] = {}
        self.ask: Callable[[], None] = lambda: None

    @abstractmethod
    def enter(self) -> None:
        """Capture and solve; afterwards `module` is ready to be tuned."""

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """Training loss on the windows with indices `rows` (b,), a scalar with gradient."""

    @abstractmethod
    def evaluate(self, *, held_out: bool) -> Tensor:
        """(2,) float64 on the device: summed loss and its weight over training or held-out windows of this rank.

        Of what would be stored if the stage ended now (lit_binq.calibration.as_stored). Called under the autocast of
        steps.
        """

    @abstractmethod
    def leave(self) -> None:
        """Pack what was tuned into the student and move on."""

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        """What this stage may train, each parameter with its learning rate; 0 leaves it as it is."""
        t = self.tuning
        for m in find_layers(self.module, LatentLinear).values():
            for p in m.code_parameters():
                yield p, t.lr_codes
            for p in m.scale_parameters():
                yield p, t.lr_scales * mean_size(p)
        for p in norm_parameters(self.module).values():
            yield p, t.lr_norms * max(mean_size(p), 1e-2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters with their learning rates, for the optimizer; also sets requires_grad.

        Rates are rounded to a quarter of a power of two, so that parameters of similar size share a group: an
        optimizer step costs launches by the group, and a whole model would have hundreds.
        """
        self.module.requires_grad_(False)
        groups: dict[float, list[nn.Parameter]] = {}
        for p, lr in self.rates():
            if lr > 0:
                p.requires_grad_(True)
                groups.setdefault(2 ** (round(4 * math.log2(lr)) / 4), []).append(p)
        return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def mean_size(p: Tensor) -> float:
    """Mean absolute value of a parameter."""
    return float(p.detach().abs().mean())
