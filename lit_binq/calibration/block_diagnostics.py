"""Diagnostics of the block that is being quantized: which windows, which methods the probe compares.

Stages call it; it changes nothing.
"""

import torch
from torch import Tensor, nn

from lit_binq.calibration.workspace import Workspace
from lit_binq.diagnostics.measure import DiagnosticsOptions, block_losses, measure_block
from lit_binq.diagnostics.probe import Method, probe
from lit_binq.models.blocks import linear_input
from lit_binq.solvers import Problem, RowColumnSolver
from lit_binq.statistics.objectives import GramAccumulator, Objective, Statistics, target_and_metric
from lit_binq.utils.json_records import BlockMeasures

PROBED: tuple[Objective, ...] = ("weight", "pseudo_target", "true_target")


class BlockDiagnostics:
    """Measures one block on the first windows of this rank.

    Args:
        work: the workspace, its streams standing at this block.
        index: the block's number.
        reference: the full-precision block, on the device.
        names: its linear layers, in the order they are called.
        options: what to measure.
    """

    def __init__(
        self, work: Workspace, index: int, reference: nn.Module, names: list[str], options: DiagnosticsOptions
    ) -> None:
        self.work, self.index, self.reference, self.names, self.options = work, index, reference, names, options
        self.call = work.calls[index]
        rows = slice(0, options.windows)
        self.x, self.x_tilde = work.streams.x[rows], work.streams.x_tilde[rows]

    def begin(self, module: nn.Module) -> None:
        """Note the losses of the closed form: `module` is solved and packed."""
        self.before = block_losses(self.reference, module, self.x, self.x_tilde, self.call)

    def end(self, module: nn.Module, shrinkage: float) -> BlockMeasures:
        """Everything of what is stored; before the streams move on.

        Args:
            module: the packed block.
            shrinkage: of the probe's objectives.
        """
        record = measure_block(
            self.reference,
            module,
            self.x,
            self.x_tilde,
            self.call,
            self.names,
            index=self.index,
            before=self.before,
            attention=self.options.attention,
        )
        if self.options.probe:
            methods: dict[str, Method] = {objective: self._method(objective, shrinkage) for objective in PROBED}
            self._statistics: dict[str, Statistics] = {}
            record.probe = probe(self.reference, self.x, self.x_tilde, self.call, self.names, methods)
        return record

    def _method(self, objective: Objective, shrinkage: float) -> Method:
        """A row x column fit of one layer inside the full-precision block."""

        def fit(name: str, linear: nn.Linear) -> Tensor:
            T, H = target_and_metric(linear.weight, self._grams(name), objective=objective, shrinkage=shrinkage)
            return RowColumnSolver().solve(Problem(T, H)).dense()

        return fit

    @torch.no_grad()
    def _grams(self, name: str) -> Statistics:
        """S and C of a layer of the full-precision block run on both streams, over the measured windows."""
        if name not in self._statistics:
            linear = self.reference.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            device = self.work.device
            grams = GramAccumulator(linear.in_features, device, "true_target")
            for w in range(len(self.x)):
                inputs = (t[w : w + 1].to(device) for t in (self.x, self.x_tilde))
                grams.add(*(linear_input(self.reference, name, hidden, self.call) for hidden in inputs))
            self._statistics = {name: grams.own_statistics()}  # one layer at a time is probed
        return self._statistics[name]
