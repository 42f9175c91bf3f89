"""What every solver promises: from the pair (T, H) to an unpacked weight of its format.

Legend: T (N, K) target, H (K, K) metric (lit_binq.statistics.objectives); W^ (N, K) the quantized weight. A solver
lowers f(W^) = tr((T - W^) H (T - W^)^T). It sees nothing else of the model.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import Solution


class Solver(ABC):
    """A way to fit a format under (T, H). Sub-classes are dataclasses: their fields are the options in a YAML file.

    Attributes:
        takes_bits: whether the size of the format can follow a bit budget.
        deployable: whether the format can be stored, tuned and exported; published baselines that cannot give dense
            weights whose bits are counted.
    """

    takes_bits: ClassVar[bool] = False
    deployable: ClassVar[bool] = True

    @abstractmethod
    def solve(self, T: Tensor, H: Tensor, *, bits: float | None = None) -> Solution:
        """Fit a weight.

        Args:
            T: (N, K) float32 target.
            H: (K, K) float32 metric, symmetric, positive diagonal.
            bits: most true bits a weight, for solvers with `takes_bits`; None leaves it to the solver's options.

        Raises:
            LitBinqError: T or H holds NaN or inf, or the format does not fit into `bits`.
        """

    def spend(self, weights: dict[str, Tensor], moments: dict[str, Tensor], bits: float) -> dict[str, float]:
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


def require_finite(T: Tensor, H: Tensor) -> None:
    """Refuse a system that no solver can use.

    Raises:
        LitBinqError: T or H holds NaN or inf.
    """
    if not (torch.isfinite(T).all() and torch.isfinite(H).all()):
        raise LitBinqError("solver: target or metric holds NaN or inf; expected finite values")


def objective_value(solution: Solution, T: Tensor, H: Tensor) -> float:
    """f = tr((T - W^) H (T - W^)^T), accumulated in float64."""
    R = (T - solution.dense()).double()
    return float(((R @ H.double()) * R).sum())
