"""What every stage of a calibration promises, and its options. The LightningModule decides only which one is on.

A block stage (block_stage.py) quantizes one decoder block; the model stage (model_stage.py), last, tunes the whole.
Stages never step an optimizer themselves.

Knows nothing of Lightning.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear
from lit_binq.models.blocks import (
    find_layers,
    norm_parameters,
)
from lit_binq.solvers import RowColumnSolver, Solver, TwoPlaneSolver
from lit_binq.solvers.gptq2 import UniformTwoBitSolver
from lit_binq.statistics.activation_format import Activations
from lit_binq.statistics.losses import BlockLoss
from lit_binq.statistics.objectives import Objective, check_options
from lit_binq.statistics.shrinkage import ShrinkageBy

QUANTIZING = (TwoPlaneSolver, UniformTwoBitSolver)
"""Solvers whose format can quantize its input."""


@dataclass
class ClosedForm:
    """How a block's linear layers are solved.

    Attributes:
        objective: what is matched: `true_target` (output alignment), `pseudo_target` (ARB-X), `naive_output` or
            `weight`.
        shrinkage: lambda, pull of the objective towards the full-precision weight; raise it for little data. `auto`
            chooses it for each group of layers with one input by its error on held-out windows, or on the second half
            of the training windows where none are held out (lit_binq.statistics.shrinkage); `true_target` only.
        shrinkage_by: what `auto` judges: `quantized`, the weight as it would be stored, which takes a solve for each
            lambda; or `target`, the target before it is quantized.
        clip_tokens: weigh tokens in the statistics so that none counts more than its window's median token (ours).
        scope: which linear layers the objective is for: `all`, or `last`, only the last of each block as in the
            paper, all others then taking `weight`.
        solver: the method and with it the format, for example `RowColumnSolver` or `PlanesSolver`.
        amp: gate updates of the row x column solver so that none lowers the similarity of token interactions
            (attention matrix preservation); `true_target` only.
        bits: most true bits a weight over all layers, spent where they lower the objective most; 0 leaves the size of
            each layer to the solver.
        activations: whether and how inputs of the layers are quantized; for `TwoPlaneSolver` and `UniformTwoBitSolver`.
            What is fitted, statistics and tuning, then sees quantized inputs.
    """

    objective: Objective = "true_target"
    shrinkage: float | Literal["auto"] = 0.1
    shrinkage_by: ShrinkageBy = "quantized"
    clip_tokens: bool = True
    scope: Literal["all", "last"] = "all"
    solver: Solver = field(default_factory=RowColumnSolver)
    amp: bool = False
    bits: float = 0.0
    activations: Activations = field(default_factory=Activations)

    def __post_init__(self) -> None:
        check_options(self.objective, 0.0 if self.shrinkage == "auto" else self.shrinkage)
        if self.shrinkage == "auto" and self.objective != "true_target":
            raise LitBinqError(
                f"closed_form.shrinkage: got auto with {self.objective}, expected a number: it is chosen by the error "
                "of `objective: true_target`"
            )
        if self.shrinkage_by not in get_args(ShrinkageBy):
            raise LitBinqError(
                f"closed_form.shrinkage_by: got {self.shrinkage_by!r}, expected one of "
                f"{', '.join(get_args(ShrinkageBy))}"
            )
        if self.scope not in ("all", "last"):
            raise LitBinqError(f"closed_form.scope: got {self.scope!r}, expected `all` or `last`")
        if self.amp and not (self.objective == "true_target" and isinstance(self.solver, RowColumnSolver)):
            raise LitBinqError(
                f"closed_form.amp: got true with {self.objective} and {type(self.solver).__name__}, expected "
                "true_target and RowColumnSolver"
            )
        if self.activations.bits and not isinstance(self.solver, QUANTIZING):
            raise LitBinqError(
                f"closed_form.activations: got {self.activations.bits} bits with {type(self.solver).__name__}, whose "
                f"format takes inputs as they are; expected `bits: 0`, or {' or '.join(s.__name__ for s in QUANTIZING)}"
            )
        if not 0 <= self.bits < math.inf:
            raise LitBinqError(f"closed_form.bits: got {self.bits}, expected a number >= 0")
        if self.bits and not self.solver.takes_bits:
            raise LitBinqError(
                f"closed_form.bits: got {self.bits} for {type(self.solver).__name__}, whose format has a fixed size; "
                "expected 0, or a solver such as PlanesSolver"
            )


@dataclass
class Tuning:
    """How a stage is tuned by gradient steps after its closed form.

    Learning rates are relative: scales and norms step by a share of their mean size, latent codes have mean size 1.

    Attributes:
        epochs: most passes over the training windows; 0 leaves the closed form as it is.
        lr_codes: for latent codes; 0 freezes the codes.
        lr_scales: for row and column scales.
        lr_norms: for norm weights and biases.
        lr_embeddings: for embeddings and an untied head, which are stored in full anyway; model stage only.
        patience: epochs without a better held-out loss after which the stage ends; 0 means never early.
        final_lr: share of the learning rate that the cosine schedule ends at.
        loss: of block stages: `token` (relative error of each token, averaged), `block` (of the whole block),
            `channel` (as `token`, every channel of the output counting alike) or `whitened` (as `token`, every
            direction counting alike); see lit_binq.calibration.block_loss.
        interaction: of block stages: weight of the error of token similarities beside `loss`; 0 leaves it out.
        codes_after: share of the stage's steps during which codes stay as they are, while scales settle.
        codes_until: share of the stage's steps after which codes stay as they are, and scales settle again.
    """

    epochs: int = 0
    lr_codes: float = 0.03
    lr_scales: float = 3e-3
    lr_norms: float = 1e-3
    lr_embeddings: float = 0.0
    patience: int = 6
    final_lr: float = 0.0
    loss: BlockLoss = "token"
    interaction: float = 0.0
    codes_after: float = 0.0
    codes_until: float = 1.0

    OPTION: ClassVar[str] = "tuning"
    """The option that holds these, for errors."""

    def __post_init__(self) -> None:
        o = self.OPTION
        for name, value in vars(self).items():
            if name != "loss" and not value >= 0:
                raise LitBinqError(f"{o}.{name}: got {value}, expected a number >= 0")
        if self.epochs and not (self.lr_codes or self.lr_scales or self.lr_norms or self.lr_embeddings):
            raise LitBinqError(f"{o}: got epochs with every learning rate 0, expected one above 0, or `epochs: 0`")
        if self.interaction == math.inf:
            raise LitBinqError(f"{o}.interaction: got inf, expected a finite number >= 0")
        if not self.codes_after < self.codes_until <= 1:
            raise LitBinqError(
                f"{o}.codes_until: got {self.codes_until} with codes_after {self.codes_after}, expected shares of "
                "the steps, codes_after < codes_until <= 1; `lr_codes: 0` keeps codes as they are throughout"
            )
        if self.loss not in get_args(BlockLoss):
            raise LitBinqError(f"{o}.loss: got {self.loss!r}, expected one of {', '.join(get_args(BlockLoss))}")


@dataclass
class ModelTuning(Tuning):
    """How the whole model is tuned at the end; the stage is left out unless it has epochs.

    Learning rates are relative: scales and norms step by a share of their mean size, latent codes have mean size 1.

    Attributes:
        epochs: most passes over the training windows; 0 leaves the stage out.
        lr_codes: for latent codes; 0 freezes the codes.
        lr_scales: for row and column scales.
        lr_norms: for norm weights and biases.
        lr_embeddings: for embeddings and an untied head, which are stored in full anyway.
        patience: epochs without a better held-out loss after which the stage ends; 0 means never early.
        final_lr: share of the learning rate that the cosine schedule ends at.
        loss: of block stages alone.
        interaction: of block stages alone.
        codes_after: share of the stage's steps during which codes stay as they are, while scales settle.
        codes_until: share of the stage's steps after which codes stay as they are, and scales settle again.
    """

    lr_codes: float = 1e-2
    lr_scales: float = 2e-3
    lr_norms: float = 2e-3
    patience: int = 3

    OPTION: ClassVar[str] = "finish"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("loss", "token"), ("interaction", 0.0)):
            if getattr(self, name) != value:
                raise LitBinqError(
                    f"finish.{name}: got {getattr(self, name)}, expected {value}: only blocks are tuned on a block's "
                    f"output, set `tuning.{name}`"
                )


CODES = "codes"
"""The mark, under the key `kind`, of parameter groups that hold latent codes."""


class Stage(ABC):
    """One step of the calibration: `enter`, then any number of `loss` steps, then `leave`.

    Args:
        work: the shared workspace.
        tuning: how this stage is tuned.

    Attributes:
        shrinkage: by linear layer, where it was chosen from data.
        activation_bits: of the inputs of each linear layer, averaged over its columns, where they are quantized.
        ask: called between groups of a closed form; raises where the fit is to stop.
    """

    title: str
    module: nn.Module

    def __init__(self, work: Workspace, tuning: Tuning) -> None:
        self.work, self.tuning = work, tuning
        self.shrinkage: dict[str, float] = {}
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
        """(2,) float64 on the device: summed loss and its weight over training or held-out windows of this rank."""

    @abstractmethod
    def leave(self) -> None:
        """Pack what was tuned into the student and move on."""

    def loose_matrices(self) -> list[nn.Parameter]:
        """Matrices outside the quantized linears that this stage may tune."""
        return []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters with their learning rates, for the optimizer; also sets requires_grad.

        Rates are rounded to a quarter of a power of two, so that parameters of similar size share a group: an
        optimizer step costs launches by the group, and a whole model would have hundreds. Codes have groups of their
        own, marked `kind: codes`, because they may have a schedule of their own.
        """
        t = self.tuning
        self.module.requires_grad_(False)
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}

        def add(p: nn.Parameter, lr: float, kind: str = "") -> None:
            if lr > 0:
                p.requires_grad_(True)
                groups.setdefault((kind, 2 ** (round(4 * math.log2(lr)) / 4)), []).append(p)

        for m in find_layers(self.module, LatentLinear).values():
            for p in m.code_parameters():
                add(p, t.lr_codes, CODES)
            for p in m.scale_parameters():
                add(p, t.lr_scales * float(p.detach().abs().mean()))
        for p in norm_parameters(self.module).values():
            add(p, t.lr_norms * max(float(p.detach().abs().mean()), 1e-2))
        for p in self.loose_matrices():
            add(p, t.lr_embeddings * float(p.detach().abs().mean()))
        return [{"params": parameters, "lr": lr, "kind": kind} for (kind, lr), parameters in groups.items()]
