"""A block stage: quantize one decoder block, group by group, and tune it on the block's output.

Legend: x, x~, y the streams (lit_binq.calibration.streams); T, H target and metric (lit_binq.statistics.objectives).

Each group of linear layers that share an input is captured after the groups before it are quantized, and solved in
closed form; then, if asked for, the whole block is tuned.

Where inputs are quantized too (`closed_form.activations`), a group's input format is chosen first, from a sample of x~,
and from then on x~ means what the layers will multiply by: S is the Gram of quantized inputs, C between x and them. So
the true target makes weights compensate for the rounding of their own input as well (ours).
"""

import logging

import torch
from torch import Tensor, nn

from lit_binq.calibration.as_stored import score_as_stored
from lit_binq.calibration.block_diagnostics import BlockDiagnostics
from lit_binq.calibration.block_loss import BlockCriterion
from lit_binq.calibration.cuda_graphs import GraphedLoss
from lit_binq.calibration.distributed import take_from_first, take_module_from_first
from lit_binq.calibration.options import BlockTuning, ClosedForm
from lit_binq.calibration.stage import Stage
from lit_binq.calibration.workspace import Workspace
from lit_binq.diagnostics.measure import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear, PackedLinear
from lit_binq.formats.activations import mean_bits
from lit_binq.formats.two_plane.linear import InputFormat
from lit_binq.formats.unquantized import round_unquantized
from lit_binq.models.blocks import (
    BlockCall,
    find_layers,
    linear_groups,
    linear_input,
    linear_inputs,
    replace_module,
    run_block,
)
from lit_binq.solvers import Origin, Problem
from lit_binq.statistics.activation_format import choose_input_format, output_error, quantized_input
from lit_binq.statistics.objectives import GramAccumulator, Statistics, target_and_metric
from lit_binq.utils.json_records import BlockMeasures

log = logging.getLogger(__name__)

NO_DIAGNOSTICS = DiagnosticsOptions()

TEACHER_BYTES = 1 << 28
"""Most that the inputs of a block's layers in the teacher may take to be kept while it is solved; where they take
more, each group of layers runs the teacher's block again, up to itself."""

SAMPLE_WINDOWS, SAMPLE_TOKENS = 64, 4096
"""At most so much of the first rank's training windows is looked at to choose an input format."""


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
        tuning: BlockTuning,
        diagnostics: DiagnosticsOptions = NO_DIAGNOSTICS,
    ) -> None:
        super().__init__(work, tuning)
        self.tuning: BlockTuning = tuning
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
        kept = self._teacher_inputs(reference, [names[0] for names in groups])
        for names in groups:
            self.ask()
            self._inputs = self._input_format(names)
            stats = self._statistics(reference, names[0], kept.pop(names[0], None))
            for name in names:
                self._solve(name, stats, last=names is groups[-1])
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
        self._criterion = BlockCriterion(self.tuning.interaction)
        self._loss = GraphedLoss(_BlockLoss(self.module, self.call, self._criterion), w.cuda_graphs)

    def _input_format(self, names: list[str]) -> InputFormat:
        """How the input that the layers `names` share is quantized; the same on all ranks."""
        options, w = self.closed_form.activations, self.work
        if not options.bits:
            return InputFormat()
        K = self._linear(names[0]).in_features
        P = options.outliers_of(K)
        if w.rank == 0:
            x, tokens = self._sample(names[0])
            energies = sum(self._linear(name).weight.detach().double().square().sum(0) for name in names)
            assert isinstance(energies, Tensor)
            inputs = choose_input_format(options, x, energies, tokens)
            log.debug(
                "block %d, %s: inputs of %.2f bits, %d of %d columns at 8; error of the rounding %.2e",
                self.index,
                ", ".join(names),
                mean_bits(K, options.bits, P),
                P if options.bits == 4 else K,
                K,
                output_error(x, inputs, energies, tokens),
            )
        else:
            like = w.device
            scales = torch.empty(5, device=like) if options.bits == 4 and options.refit else None
            fixed = torch.empty(4, device=like) if options.static else None
            inputs = InputFormat(options.bits, torch.empty(P, dtype=torch.int64, device=like), scales, fixed)
        take_from_first(t for t in (inputs.outliers, inputs.scales, inputs.range) if t is not None)
        self.activation_bits |= dict.fromkeys(names, mean_bits(K, options.bits, P))
        return inputs

    def _sample(self, name: str) -> tuple[Tensor, Tensor]:
        """Inputs (M, K) of a layer in the quantized stream and their weights (M,), evenly over training windows."""
        s, device = self.work.streams, self.work.device
        windows = torch.linspace(0, s.train - 1, min(s.train, SAMPLE_WINDOWS)).long()
        T = s.x_tilde.shape[1]
        count = min(T, -(-SAMPLE_TOKENS // len(windows)))
        samples, weights = [], []
        for i in range(0, len(windows), s.options.batch_windows):
            rows = windows[i : i + s.options.batch_windows]
            hidden = s.x_tilde[rows.to(s.x_tilde.device)].to(device)
            x = linear_input(self.module, name, hidden, self.call).reshape(len(rows), T, -1)
            omega = self._token_weights(x, len(rows)).reshape(len(rows), T)
            # In every window other places: a step of the golden ratio spreads them most evenly.
            first = ((torch.arange(i, i + len(rows)) * 0.6180339887) % 1 * T).long()
            places = ((first[:, None] + torch.arange(count) * T // count) % T).to(device)
            samples.append(x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1))
            weights.append(omega.gather(1, places).flatten())
        total = torch.cat(weights)
        return torch.cat(samples), total if self.closed_form.clip_tokens else torch.ones_like(total)

    def _teacher_inputs(self, reference: nn.Module, names: list[str]) -> dict[str, list[Tensor]]:
        """Inputs of layers in the teacher, batch by batch, from one pass for all; nothing where that takes much."""
        s, device = self.work.streams, self.work.device
        K = sum(self._linear(name).in_features for name in names)
        if self.closed_form.objective == "weight" or 4 * K * s.train * s.x.shape[1] > TEACHER_BYTES:
            return {}
        passes = [linear_inputs(reference, names, s.x[rows].to(device), self.call) for rows in s.batches(s.train)]
        return dict(zip(names, map(list, zip(*passes, strict=True)), strict=True))

    def _statistics(self, reference: nn.Module, name: str, kept: list[Tensor] | None = None) -> Statistics | None:
        """Grams of the input that a group of layers, `name` the first, share; over all training windows.

        Args:
            reference: the teacher's block.
            name: of the layer.
            kept: its inputs in the teacher, if they are there already.
        """
        objective, w = self.closed_form.objective, self.work
        if objective == "weight":
            return None
        grams = GramAccumulator(self._linear(name).in_features, w.device, objective)
        for i, rows in enumerate(w.streams.batches(w.streams.train)):
            # Only the true target needs both streams: S of the quantized one, C between the two.
            x = kept[i] if kept else linear_input(reference, name, w.streams.x[rows].to(w.device), self.call)
            x_tilde = (
                x
                if objective == "naive_output"
                else quantized_input(
                    linear_input(self.module, name, w.streams.x_tilde[rows].to(w.device), self.call), self._inputs
                )
            )
            weights = self._token_weights(x, rows.stop - rows.start) if self.closed_form.clip_tokens else None
            grams.add(x, x_tilde, weights)
        try:
            return grams.statistics()
        except LitBinqError as error:
            raise LitBinqError(f"block {self.index}, {name}: {error}") from None

    def _linear(self, name: str) -> nn.Linear:
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    @staticmethod
    def _token_weights(x: Tensor, windows: int) -> Tensor:
        """Weights m / max(|x|^2, m), m the median |x|^2 of the token's window: a massive token counts as any other.

        Medians by window, so that the weights depend neither on the batch size nor on the number of ranks.
        """
        norms = x.reshape(windows, -1, x.shape[-1]).float().square().sum(-1)  # (b, T)
        median = norms.median(1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
        return (median / norms.maximum(median)).flatten()

    def _solve(self, name: str, stats: Statistics | None, *, last: bool) -> None:
        form, linear = self.closed_form, self._linear(name)
        origin = Origin(linear.weight, None if stats is None else stats.C, last)
        try:
            T, H = target_and_metric(linear.weight, stats, objective=form.objective, shrinkage=form.shrinkage)
            bits = self.work.bits.get(f"{self.index}.{name}")
            packed = form.solver.solve(Problem(T, H, bits, self._inputs, origin)).pack(linear.bias)
        except LitBinqError as error:
            raise LitBinqError(f"block {self.index}, {name}: {error}") from None
        if self.tuning.epochs and self.tuning.lr_codes:
            self._targets[name] = T
        take_module_from_first(packed)  # ranks solve the same system; should their libraries round differently
        replace_module(self.module, name, packed)

    def loss(self, rows: Tensor) -> Tensor:
        """The block's loss on windows `rows` (b,), relative to full precision's output."""
        s, device = self.work.streams, self.work.device
        rows = rows.to(s.x_tilde.device)
        return self._loss(s.x_tilde[rows].to(device), s.y[rows].to(device))

    def evaluate(self, *, held_out: bool) -> Tensor:
        """The two sums of the block's relative error, as it will be stored."""
        s = self.work.streams
        rows = slice(s.train, s.train + s.held_out) if held_out else slice(0, s.train)

        def sums() -> Tensor:
            return s.block_error(self.module, self.call, rows, self._criterion.sums)

        return score_as_stored(self.module, self.work.unquantized_dtype, self.work.device, sums)

    def leave(self) -> None:
        """Pack the block, put it into the student, advance both streams with exactly what is stored."""
        w = self.work
        self._loss.release()
        for name, layer in find_layers(self.module, LatentLinear).items():
            replace_module(self.module, name, layer.pack())
        self.module.requires_grad_(False)
        round_unquantized(self.module, w.unquantized_dtype)
        take_module_from_first(self.module)  # latents agree, but a tie may be rounded differently by unlike devices
        if self._diagnostics is not None:
            self.measures = self._diagnostics.end(self.module, self.closed_form.shrinkage)
        w.place(self.index, self.module)


class _BlockLoss(nn.Module):
    """x~, y (b, T, d) to the loss of the block's output, a scalar."""

    def __init__(self, block: nn.Module, call: BlockCall, criterion: BlockCriterion) -> None:
        super().__init__()
        self.block, self.call, self.criterion = block, call, criterion

    def forward(self, x_tilde: Tensor, y: Tensor) -> Tensor:
        return self.criterion.loss(run_block(self.block, x_tilde, self.call), y)
