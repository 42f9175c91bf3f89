"""What every solver promises: from one problem to an unpacked weight of its format.

Legend: T (N, K) target, H (K, K) metric (lit_binq.statistics.objectives); W^ (N, K) the quantized weight. A solver
lowers f(W^) = tr((T - W^) H (T - W^)^T). It sees nothing of the model but its `Problem`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import Solution
from lit_binq.formats.two_plane.solution import InputFormat


@dataclass(frozen=True)
class Origin:
    """Where a problem comes from: for published baselines that a target and a metric do not describe.

    Attributes:
        weight: W (N, K) full-precision weight.
        cross: C = E[x x~^T] (K, K); zeros for objectives that do not collect it, None for those without statistics.
        last: whether the layer is in the last group of its block.
    """

    weight: Tensor
    cross: Tensor | None
    last: bool


@dataclass(frozen=True)
class Problem:
    """One linear layer to be solved.

    Attributes:
        T: (N, K) float32 target.
        H: (K, K) float32 metric, symmetric, positive diagonal.
        bits: most true bits a weight, for solvers with `takes_bits`; None leaves it to the solver's options.
        inputs: how the layer's input will be quantized, for solvers with `quantizes_inputs`; by default not at all.
        origin: what published baselines ask for beyond that.
    """

    T: Tensor
    H: Tensor
    bits: float | None = None
    inputs: InputFormat = field(default_factory=InputFormat)
    origin: Origin | None = None

    def finite(self) -> tuple[Tensor, Tensor]:
        """T and H.

        Raises:
            LitBinqError: T or H holds NaN or inf.
        """
        if not (torch.isfinite(self.T).all() and torch.isfinite(self.H).all()):
            raise LitBinqError("solver: target or metric holds NaN or inf; expected finite values")
        return self.T, self.H


class Solver(ABC):
    """A way to fit a format. Sub-classes are dataclasses: their fields are the options in a YAML file.

    Attributes:
        takes_bits: whether the size of the format can follow a bit budget.
        quantizes_inputs: whether the format can quantize its input.
        deployable: whether the format can be stored, tuned and exported; published baselines that cannot give dense
            weights whose bits are counted.
    """

    takes_bits: ClassVar[bool] = False
    quantizes_inputs: ClassVar[bool] = False
    deployable: ClassVar[bool] = True

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Fit a weight, float32.

        Raises:
            LitBinqError: T or H holds NaN or inf, the format does not fit into `bits`, or `inputs` cannot be stored.
        """

    def allocate_bits(self, weights: dict[str, Tensor], moments: dict[str, Tensor], bits: float) -> dict[str, float]:
        """How many bits each layer may take, so that all together take at most `bits` a weight.

        Here: as many for each. Solvers that know where a bit gains most do better.

        Args:
            weights: W (N, K) of every layer, by name.
            moments: E[x_j^2] (K,) of every layer's input in full precision.
            bits: true bits a weight, over all layers.

        Raises:
            LitBinqError: the format does not fit.
        """
        return dict.fromkeys(weights, bits)


def objective_value(solution: Solution, T: Tensor, H: Tensor) -> float:
    """f = tr((T - W^) H (T - W^)^T), accumulated in float64."""
    R = (T - solution.dense()).double()
    return float(((R @ H.double()) * R).sum())
