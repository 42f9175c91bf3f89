"""One stage of a calibration: capture, solve, tune, advance. The LightningModule decides only which one is on.

Legend: x, x~, y the streams (lit_binq.streams); T, H target and metric (lit_binq.objectives).

A block stage quantizes one decoder block: each linear group is captured after the groups before it are
quantized, solved in closed form and, if asked for, tuned on the block's output. The model stage, last,
tunes scales, norms and, slowly, codes on the teacher's distribution. Stages never step an optimizer themselves.

May touch: blocks, streams, objectives, solvers, formats, losses. Knows nothing of Lightning.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_binq.blocks import (
    BlockCall,
    find_layers,
    linear_groups,
    linear_input,
    move,
    norm_parameters,
    replace_module,
    run_block,
)
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear, PackedLinear
from lit_binq.graphs import GraphedLoss
from lit_binq.losses import BlockLoss, block_errors, kl_divergence
from lit_binq.objectives import GramAccumulator, Objective, Statistics, check_options, target_and_metric
from lit_binq.solvers import RowColumnSolver, Solver
from lit_binq.workspace import Workspace, round_parameters


@dataclass
class ClosedForm:
    """How a block's linear layers are solved.

    Attributes:
        objective: what is matched: `true_target` (output alignment), `pseudo_target` (ARB-X), `naive_output` or
            `weight`.
        shrinkage: lambda, pull of the objective towards the full-precision weight; raise it for little data.
        clip_tokens: weigh tokens in the statistics so that none counts more than its window's median token (ours).
        scope: which linear layers the objective is for: `all`, or `last`, only the last of each block as in the
            paper, all others then taking `weight`.
        solver: the method and with it the format, for example `RowColumnSolver` or `SalientSolver`.
        bits: most true bits a weight over all layers, spent where they lower the objective most; 0 leaves the size of
            each layer to the solver.
    """

    objective: Objective = "true_target"
    shrinkage: float = 0.1
    clip_tokens: bool = True
    scope: Literal["all", "last"] = "all"
    solver: Solver = field(default_factory=RowColumnSolver)
    bits: float = 0.0

    def __post_init__(self) -> None:
        check_options(self.objective, self.shrinkage)
        if self.scope not in ("all", "last"):
            raise LitBinqError(f"closed_form.scope: got {self.scope!r}, expected `all` or `last`")
        if not 0 <= self.bits < math.inf:
            raise LitBinqError(f"closed_form.bits: got {self.bits}, expected a number >= 0")
        if self.bits and not self.solver.takes_bits:
            raise LitBinqError(
                f"closed_form.bits: got {self.bits} for {type(self.solver).__name__}, whose format has a fixed size; "
                "expected 0, or a solver such as SalientSolver"
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
        loss: of block stages: `token` (relative error of each token, averaged) or `block` (of the whole block).
    """

    epochs: int = 0
    lr_codes: float = 0.03
    lr_scales: float = 3e-3
    lr_norms: float = 1e-3
    lr_embeddings: float = 0.0
    patience: int = 6
    final_lr: float = 0.0
    loss: BlockLoss = "token"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "loss" and not value >= 0:
                raise LitBinqError(f"tuning.{name}: got {value}, expected a number >= 0")
        if self.epochs and not (self.lr_codes or self.lr_scales or self.lr_norms):
            raise LitBinqError("tuning: got epochs with every learning rate 0, expected one above 0, or `epochs: 0`")
        if self.loss not in get_args(BlockLoss):
            raise LitBinqError(f"tuning.loss: got {self.loss!r}, expected one of {', '.join(get_args(BlockLoss))}")


def end_stage_tuning() -> Tuning:
    """Defaults of the model stage: left out; when switched on, scales, norms and, slowly, codes."""
    return Tuning(epochs=0, lr_codes=1e-2, lr_scales=2e-3, lr_norms=2e-3, patience=3)


class Stage(ABC):
    """One step of the calibration: `enter`, then any number of `loss` steps, then `leave`.

    Args:
        work: the shared workspace.
        tuning: how this stage is tuned.
    """

    title: str
    module: nn.Module

    def __init__(self, work: Workspace, tuning: Tuning) -> None:
        self.work, self.tuning = work, tuning

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
        optimizer step costs launches by the group, and a whole model would have hundreds.
        """
        t = self.tuning
        self.module.requires_grad_(False)
        groups: dict[float, list[nn.Parameter]] = {}

        def add(p: nn.Parameter, lr: float) -> None:
            if lr > 0:
                p.requires_grad_(True)
                groups.setdefault(2 ** (round(4 * math.log2(lr)) / 4), []).append(p)

        for m in find_layers(self.module, LatentLinear).values():
            for p in m.code_parameters():
                add(p, t.lr_codes)
            for p in m.scale_parameters():
                add(p, t.lr_scales * float(p.detach().abs().mean()))
        for p in norm_parameters(self.module).values():
            add(p, t.lr_norms * max(float(p.detach().abs().mean()), 1e-2))
        for p in self.loose_matrices():
            add(p, t.lr_embeddings * float(p.detach().abs().mean()))
        return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


class BlockStage(Stage):
    """Quantize decoder block i.

    Args:
        work: the shared workspace, its streams standing at block i.
        index: i.
        closed_form: how linear layers are solved.
        tuning: how the block is tuned.
    """

    def __init__(self, work: Workspace, index: int, closed_form: ClosedForm, tuning: Tuning) -> None:
        super().__init__(work, tuning)
        self.index, self.closed_form = index, closed_form
        self.call: BlockCall = work.calls[index]
        self.title = f"block {index}"

    @torch.no_grad()
    def enter(self) -> None:
        """Solve the block's linear groups one after the other and compute the targets of the tuning."""
        w = self.work
        reference = w.teacher_blocks[self.index].to(w.device)
        self.module = w.new_block(self.index)
        self._targets: dict[str, Tensor] = {}
        groups = linear_groups(reference, w.streams.x[:1].to(w.device), self.call)
        for names in groups:
            objective = self.closed_form.objective
            if self.closed_form.scope == "last" and names is not groups[-1]:
                objective = "weight"
            stats = self._statistics(reference, names[0], objective)
            for name in names:
                self._solve(name, stats, objective)
        if self.tuning.epochs:
            for name, layer in find_layers(self.module, PackedLinear).items():
                latent = layer.latent(bool(self.tuning.lr_codes), self._targets.pop(name, None))
                replace_module(self.module, name, latent)
        w.streams.compute_targets(reference, self.call)
        measure = _BlockLoss(self.module, self.call, self.tuning.loss, w.streams.mean_square())
        self._loss = GraphedLoss(measure, w.cuda_graphs)

    def _statistics(self, reference: nn.Module, name: str, objective: Objective) -> Statistics | None:
        w = self.work
        if objective == "weight":
            return None
        linear = reference.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        grams = GramAccumulator(linear.in_features, w.device, objective)
        for rows in w.streams.batches(w.streams.train):
            # Only the true target needs both streams: S of the quantized one, C between the two.
            x = linear_input(reference, name, w.streams.x[rows].to(w.device), self.call)
            x_tilde = (
                x
                if objective == "naive_output"
                else linear_input(self.module, name, w.streams.x_tilde[rows].to(w.device), self.call)
            )
            weights = self._token_weights(x, rows.stop - rows.start) if self.closed_form.clip_tokens else None
            grams.add(x, x_tilde, weights)
        try:
            return grams.statistics()
        except LitBinqError as error:
            raise LitBinqError(f"block {self.index}, {name}: {error}") from None

    @staticmethod
    def _token_weights(x: Tensor, windows: int) -> Tensor:
        """Weights m / max(|x|^2, m), m the median |x|^2 of the token's window: a massive token counts as any other.

        Medians by window, so that the weights depend neither on the batch size nor on the number of ranks.
        """
        norms = x.reshape(windows, -1, x.shape[-1]).float().square().sum(-1)  # (b, T)
        median = norms.median(1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
        return (median / norms.maximum(median)).flatten()

    def _solve(self, name: str, stats: Statistics | None, objective: Objective) -> None:
        form = self.closed_form
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            T, H = target_and_metric(linear.weight, stats, objective=objective, shrinkage=form.shrinkage)
            bits = self.work.bits.get(f"{self.index}.{name}")
            packed = form.solver.solve(T, H, bits=bits).pack(linear.bias)
        except LitBinqError as error:
            raise LitBinqError(f"block {self.index}, {name}: {error}") from None
        if self.tuning.epochs and self.tuning.lr_codes:
            self._targets[name] = T
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Ranks solve the same system; should their libraries round differently, rank 0 is right.
            for tensor in packed.weight_buffers().values():
                torch.distributed.broadcast(tensor, 0)
            packed.refresh()
        replace_module(self.module, name, packed)

    def loss(self, rows: Tensor) -> Tensor:
        """Relative squared error of the block's output on windows `rows` (b,)."""
        s, device = self.work.streams, self.work.device
        rows = rows.to(s.x_tilde.device)
        return self._loss(s.x_tilde[rows].to(device), s.y[rows].to(device))

    def evaluate(self, *, held_out: bool) -> Tensor:
        """The two sums of the block's relative error."""
        s = self.work.streams
        rows = slice(s.train, s.train + s.held_out) if held_out else slice(0, s.train)
        return s.block_error(self.module, self.call, rows, self.tuning.loss)

    def leave(self) -> None:
        """Pack the block, put it into the student, advance both streams with exactly what is stored."""
        w = self.work
        for name, layer in find_layers(self.module, LatentLinear).items():
            replace_module(self.module, name, layer.pack())
        self.module.requires_grad_(False)
        round_parameters(self.module, w.rest_dtype)
        w.place(self.index, self.module)


class _BlockLoss(nn.Module):
    """x~, y (b, T, d) to the relative squared error of the block's output, a scalar."""

    def __init__(self, block: nn.Module, call: BlockCall, kind: BlockLoss, mean_square: Tensor) -> None:
        super().__init__()
        self.block, self.call, self.kind, self.mean_square = block, call, kind, mean_square

    def forward(self, x_tilde: Tensor, y: Tensor) -> Tensor:
        error, norm = block_errors(run_block(self.block, x_tilde, self.call), y, self.kind)
        # Over the whole block's norm rather than this batch's, so that steps weigh alike.
        return error / (norm if self.kind == "token" else self.mean_square * y.numel())


class _ModelLoss(nn.Module):
    """Token windows (b, T) to the mean KL(teacher || student) over their tokens, a scalar."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, windows: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(input_ids=windows, use_cache=False).logits
        return kl_divergence(self.student(input_ids=windows, use_cache=False).logits, teacher)


class ModelStage(Stage):
    """Tune the whole student on the teacher's next-token distribution: scales, norms and, with care, codes.

    Args:
        work: the workspace, every block packed.
        tuning: how the model is tuned.
    """

    title = "model"

    def enter(self) -> None:
        """Make the packed linears trainable again and move teacher and student to the device."""
        w = self.work
        w.streams.close()
        move(w.teacher, w.device)
        for block in w.blocks:
            block.to(w.device)
            for name, layer in find_layers(block, PackedLinear).items():
                # Latents left over from block tuning sit close to zero where a code was undecided, and would flip at
                # once by the thousand. From one common size only codes that are pushed steadily flip.
                replace_module(block, name, layer.latent(bool(self.tuning.lr_codes)))
        self.module = move(w.student, w.device)
        self._windows = w.streams.windows.to(w.device)
        self._loss = GraphedLoss(_ModelLoss(self.module, w.teacher), w.cuda_graphs)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean KL(teacher || student) over the tokens of windows `rows` (b,)."""
        return self._loss(self._windows[rows.to(self._windows.device)])

    @torch.no_grad()
    def evaluate(self, *, held_out: bool) -> Tensor:
        """Summed KL over windows, and the number of windows."""
        s = self.work.streams
        first, last = (s.train, s.train + s.held_out) if held_out else (0, s.train)
        total = torch.zeros(2, dtype=torch.float64, device=self.work.device)
        step = min(s.options.batch_windows, 8)  # logits of a large vocabulary are what takes the memory
        for i in range(first, last, step):
            rows = torch.arange(i, min(i + step, last))
            total += torch.stack((self.loss(rows).double() * len(rows), torch.full_like(total[0], len(rows))))
        return total

    def loose_matrices(self) -> list[nn.Parameter]:
        """The student's embeddings, and its head where that is not the same tensor."""
        return list(self.work.loose_matrices().values())

    def leave(self) -> None:
        """Pack the student's linears again."""
        for block in self.work.blocks:
            for name, layer in find_layers(block, LatentLinear).items():
                replace_module(block, name, layer.pack())
        self.module.requires_grad_(False)
        round_parameters(self.module, self.work.rest_dtype)
