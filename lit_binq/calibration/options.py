"""Options of a calibration: how linear layers are solved, and how blocks and the whole model are tuned."""

import math
from dataclasses import dataclass, field
from typing import Any

from lit_binq.errors import LitBinqError
from lit_binq.solvers import RowColumnSolver, Solver
from lit_binq.statistics.activation_format import Activations
from lit_binq.statistics.objectives import Objective, check_options


@dataclass
class ClosedForm:
    """How a block's linear layers are solved.

    Attributes:
        objective: what is matched: `true_target` (output alignment), `pseudo_target` (ARB-X), `naive_output` or
            `weight`.
        shrinkage: lambda, pull of the objective towards the full-precision weight; raise it for little data.
        clip_tokens: weigh tokens in the statistics so that none counts more than its window's median token (ours).
        solver: the method and with it the format, for example `RowColumnSolver` or `PlanesSolver`.
        bits: most true bits a weight over all layers, spent where they lower the objective most; 0 leaves the size of
            each layer to the solver.
        activations: whether and how inputs of the layers are quantized; for `TwoPlaneSolver` and `UniformTwoBitSolver`.
            What is fitted, statistics and tuning, then sees quantized inputs.
    """

    objective: Objective = "true_target"
    shrinkage: float = 0.1
    clip_tokens: bool = True
    solver: Solver = field(default_factory=RowColumnSolver)
    bits: float = 0.0
    activations: Activations = field(default_factory=Activations)

    def __post_init__(self) -> None:
        check_options(self.objective, self.shrinkage)
        if self.activations.bits and not self.solver.quantizes_inputs:
            raise LitBinqError(
                f"closed_form.activations: got {self.activations.bits} bits with {type(self.solver).__name__}, whose "
                "format takes inputs as they are; expected `bits: 0`, or a solver such as TwoPlaneSolver"
            )
        if not 0 <= self.bits < math.inf:
            raise LitBinqError(f"closed_form.bits: got {self.bits}, expected a number >= 0")
        if self.bits and not self.solver.takes_bits:
            raise LitBinqError(
                f"closed_form.bits: got {self.bits} for {type(self.solver).__name__}, whose format has a fixed size; "
                "expected 0, or a solver such as PlanesSolver"
            )


@dataclass
class BlockTuning:
    """How each block is tuned by gradient steps after its closed form.

    Learning rates are relative: scales and norms step by a share of their mean size, latent codes have mean size 1.

    Attributes:
        epochs: passes over the training windows; 0 leaves the closed form as it is.
        lr_codes: for latent codes; 0 freezes the codes.
        lr_scales: for row and column scales.
        lr_norms: for norm weights and biases.
        interaction: weight of the error of token similarities beside the relative error of each token; 0 leaves it
            out (lit_binq.calibration.block_loss).

    Raises:
        LitBinqError: a value outside its range, or epochs with nothing to train.
    """

    epochs: int = 0
    lr_codes: float = 0.03
    lr_scales: float = 3e-3
    lr_norms: float = 1e-3
    interaction: float = 0.0

    def __post_init__(self) -> None:
        _require("tuning", vars(self))


@dataclass
class ModelTuning:
    """How the whole model is tuned at the end; the stage is left out unless it has epochs.

    Learning rates are relative: scales and norms step by a share of their mean size, latent codes have mean size 1.

    Attributes:
        epochs: passes over the training windows; 0 leaves the stage out.
        lr_codes: for latent codes; 0 freezes the codes.
        lr_scales: for row and column scales.
        lr_norms: for norm weights and biases.
        lr_embeddings: for embeddings and an untied head, which are stored in full anyway.

    Raises:
        LitBinqError: a value outside its range, or epochs with nothing to train.
    """

    epochs: int = 0
    lr_codes: float = 1e-2
    lr_scales: float = 2e-3
    lr_norms: float = 2e-3
    lr_embeddings: float = 0.0

    def __post_init__(self) -> None:
        _require("end_to_end", vars(self))


def _require(option: str, values: dict[str, Any]) -> None:
    """Refuse wrong values of a tuning; `option` is the name by which users know it."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise LitBinqError(f"{option}.{name}: got {value}, expected a finite number >= 0")
    if values["epochs"] and not any(value for name, value in values.items() if name.startswith("lr_")):
        raise LitBinqError(f"{option}: got epochs with every learning rate 0, expected one above 0, or `epochs: 0`")
