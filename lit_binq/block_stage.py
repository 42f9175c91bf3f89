"""A block stage: quantize one decoder block, group by group, and tune it on the block's output.

Legend: x, x~, y the streams (lit_binq.streams); T, H target and metric (lit_binq.objectives).

Each group of linear layers that share an input is captured after the groups before it are quantized, and solved in
closed form; then, if asked for, the whole block is tuned.

May touch: blocks, streams, objectives, solvers, formats, losses, diagnostics. Knows nothing of Lightning.
"""

import torch
from torch import Tensor, nn

from lit_binq.block_diagnostics import BlockDiagnostics
from lit_binq.blocks import BlockCall, find_layers, linear_groups, linear_input, replace_module, run_block
from lit_binq.diagnostics import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear, PackedLinear, Solution
from lit_binq.graphs import GraphedLoss
from lit_binq.losses import BlockLoss, block_errors
from lit_binq.objectives import GramAccumulator, Objective, Statistics, target_and_metric
from lit_binq.records import BlockMeasures
from lit_binq.solvers import RowColumnSolver
from lit_binq.solvers.amp import amp_metric
from lit_binq.stages import ClosedForm, Stage, Tuning
from lit_binq.workspace import Workspace, round_parameters

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
            stats = self._statistics(reference, names[0], objective)
            for name in names:
                self._solve(name, stats, objective)
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
            if form.amp and stats is not None and isinstance(form.solver, RowColumnSolver):
                solution: Solution = form.solver.solve(T, H, amp=amp_metric(linear.weight, stats.C))
            else:
                solution = form.solver.solve(T, H, bits=bits)
            packed = solution.pack(linear.bias)
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
        if self._diagnostics is not None:
            self.measures = self._diagnostics.end(self.module, self.closed_form.shrinkage)
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
