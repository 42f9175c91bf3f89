"""A block stage: quantize one decoder block, group by group, and tune it on the block's output.

Legend: x, x~, y the streams (lit_binq.streams); T, H target and metric (lit_binq.objectives).

Each group of linear layers that share an input is captured after the groups before it are quantized, and solved in
closed form; then, if asked for, the whole block is tuned.

May touch: blocks, streams, objectives, shrinkage, solvers, formats, block_criterion, diagnostics. Knows nothing of
Lightning.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_binq.block_criterion import BlockCriterion, output_metric
from lit_binq.block_diagnostics import BlockDiagnostics
from lit_binq.blocks import BlockCall, find_layers, linear_groups, linear_input, replace_module, run_block
from lit_binq.diagnostics import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear, PackedLinear, Solution
from lit_binq.graphs import GraphedLoss
from lit_binq.objectives import GramAccumulator, Objective, Statistics, target_and_metric
from lit_binq.records import BlockMeasures
from lit_binq.shrinkage import choose_shrinkage, pooled, split
from lit_binq.solvers import RowColumnSolver
from lit_binq.solvers.amp import amp_metric
from lit_binq.stages import ClosedForm, Stage, Tuning
from lit_binq.workspace import Workspace, round_parameters

log = logging.getLogger(__name__)

NO_DIAGNOSTICS = DiagnosticsOptions()


class BlockStage(Stage):
    """Quantize decoder block i.

    Args:
        work: the shared workspace, its streams standing at block i.
        index: i.
        closed_form: how linear layers are solved.
        tuning: how the block is tuned.
        diagnostics: what is measured of it.

    Attributes:
        measures: the diagnostics, after `leave`; None where none are asked for, or on other ranks than the first.
    """

    def __init__(
        self,
        work: Workspace,
        index: int,
        closed_form: ClosedForm,
        tuning: Tuning,
        diagnostics: DiagnosticsOptions = NO_DIAGNOSTICS,
    ) -> None:
        super().__init__(work, tuning)
        self.index, self.closed_form, self.diagnostics = index, closed_form, diagnostics
        self.measures: BlockMeasures | None = None
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
            stats, shrinkage = self._statistics(reference, names, objective)
            for name in names:
                self._solve(name, stats, objective, shrinkage)
        self._diagnostics = None
        if self.diagnostics.windows and w.rank == 0:
            self._diagnostics = BlockDiagnostics(
                w, self.index, reference, [name for names in groups for name in names], self.diagnostics
            )
            self._diagnostics.begin(self.module)
        if self.tuning.epochs:
            for name, layer in find_layers(self.module, PackedLinear).items():
                latent = layer.latent(bool(self.tuning.lr_codes), self._targets.pop(name, None))
                replace_module(self.module, name, latent)
        w.streams.compute_targets(reference, self.call)
        t = self.tuning
        metric = output_metric(t.loss, w.streams.unit_gram()) if t.loss in ("channel", "whitened") else None
        self._criterion = BlockCriterion(t.loss, w.streams.mean_square(), metric, t.interaction)
        self._loss = GraphedLoss(_BlockLoss(self.module, self.call, self._criterion), w.cuda_graphs)

    def _statistics(
        self, reference: nn.Module, names: list[str], objective: Objective
    ) -> tuple[Statistics | None, float]:
        """Statistics of a group of layers with one input, and the shrinkage that goes with them."""
        form, s = self.closed_form, self.work.streams
        if objective == "weight":
            return None, 0.0
        try:
            if form.shrinkage != "auto":
                return self._grams(reference, names[0], objective, slice(0, s.train)), form.shrinkage
            fit_on, judge_on = split(s.train, s.held_out)
            fitting = self._grams(reference, names[0], objective, fit_on)
            validating = self._grams(reference, names[0], objective, judge_on, validating=True)
            weights = {name: self._linear(name).weight.detach() for name in names}

            def candidate(name: str, shrinkage: float) -> Tensor:
                T, solve = self._fit(name, fitting, objective, shrinkage)
                return T if form.shrinkage_by == "target" else solve().dense()

            choice = choose_shrinkage(weights, validating, candidate)
        except LitBinqError as error:
            raise LitBinqError(f"block {self.index}, {names[0]}: {error}") from None
        log.debug(
            "block %d, %s: shrinkage %g of {%s}",
            self.index,
            ", ".join(names),
            choice.shrinkage,
            ", ".join(f"{value:g}: {error:.4f}" for value, error in choice.errors.items()),
        )
        self.shrinkage |= dict.fromkeys(names, choice.shrinkage)
        return fitting if s.held_out else pooled(fitting, validating), choice.shrinkage

    def _linear(self, name: str) -> nn.Linear:
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    def _grams(
        self, reference: nn.Module, name: str, objective: Objective, windows: slice, *, validating: bool = False
    ) -> Statistics:
        """Grams of a layer's input over consecutive windows, of all ranks."""
        w = self.work
        grams = GramAccumulator(self._linear(name).in_features, w.device, objective, validating=validating)
        for rows in w.streams.batches(windows.stop, windows.start):
            # Only the true target needs both streams: S of the quantized one, C between the two.
            x = linear_input(reference, name, w.streams.x[rows].to(w.device), self.call)
            x_tilde = (
                x
                if objective == "naive_output"
                else linear_input(self.module, name, w.streams.x_tilde[rows].to(w.device), self.call)
            )
            weights = self._token_weights(x, rows.stop - rows.start) if self.closed_form.clip_tokens else None
            grams.add(x, x_tilde, weights)
        return grams.statistics()

    @staticmethod
    def _token_weights(x: Tensor, windows: int) -> Tensor:
        """Weights m / max(|x|^2, m), m the median |x|^2 of the token's window: a massive token counts as any other.

        Medians by window, so that the weights depend neither on the batch size nor on the number of ranks.
        """
        norms = x.reshape(windows, -1, x.shape[-1]).float().square().sum(-1)  # (b, T)
        median = norms.median(1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
        return (median / norms.maximum(median)).flatten()

    def _fit(
        self, name: str, stats: Statistics | None, objective: Objective, shrinkage: float
    ) -> tuple[Tensor, Callable[[], Solution]]:
        """A layer's target (N, K), and what solves for it."""
        form, weight = self.closed_form, self._linear(name).weight
        T, H = target_and_metric(weight, stats, objective=objective, shrinkage=shrinkage)

        def solve() -> Solution:
            if form.amp and stats is not None and isinstance(form.solver, RowColumnSolver):
                return form.solver.solve(T, H, amp=amp_metric(weight, stats.C))
            return form.solver.solve(T, H, bits=self.work.bits.get(f"{self.index}.{name}"))

        return T, solve

    def _solve(self, name: str, stats: Statistics | None, objective: Objective, shrinkage: float) -> None:
        try:
            T, solve = self._fit(name, stats, objective, shrinkage)
            packed = solve().pack(self._linear(name).bias)
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
        """The block's loss on windows `rows` (b,), relative to full precision's output."""
        s, device = self.work.streams, self.work.device
        rows = rows.to(s.x_tilde.device)
        return self._loss(s.x_tilde[rows].to(device), s.y[rows].to(device))

    def evaluate(self, *, held_out: bool) -> Tensor:
        """The two sums of the block's relative error."""
        s = self.work.streams
        rows = slice(s.train, s.train + s.held_out) if held_out else slice(0, s.train)
        return s.block_error(self.module, self.call, rows, self._criterion.sums)

    def leave(self) -> None:
        """Pack the block, put it into the student, advance both streams with exactly what is stored."""
        w = self.work
        for name, layer in find_layers(self.module, LatentLinear).items():
            replace_module(self.module, name, layer.pack())
        self.module.requires_grad_(False)
        round_parameters(self.module, w.rest_dtype)
        if self._diagnostics is not None:
            fixed = self.closed_form.shrinkage
            self.measures = self._diagnostics.end(self.module, self.shrinkage if fixed == "auto" else fixed)
        w.place(self.index, self.module)


class _BlockLoss(nn.Module):
    """x~, y (b, T, d) to the loss of the block's output, a scalar."""

    def __init__(self, block: nn.Module, call: BlockCall, criterion: BlockCriterion) -> None:
        super().__init__()
        self.block, self.call, self.criterion = block, call, criterion

    def forward(self, x_tilde: Tensor, y: Tensor) -> Tensor:
        return self.criterion.loss(run_block(self.block, x_tilde, self.call), y)
