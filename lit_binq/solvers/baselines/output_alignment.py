"""Output alignment as its paper has it: the row x column form with AMP, for the last linear layers of a block alone.

The core keeps what helps (the true target, for every layer); this is for the rows of the table that are the paper's.
With `objective: true_target`, `shrinkage: 0` and `clip_tokens: false` a fit is the published one.

Source: arXiv 2512.21651 v1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.row_column import RowColumn
from lit_binq.solvers.base import Problem
from lit_binq.solvers.baselines.amp import amp_metric, gate_columns, gate_rows, gated_codes
from lit_binq.solvers.row_column import (
    START_ITERATIONS,
    RowColumnSolver,
    start,
    update_column_scales,
    update_row_scales,
)


@dataclass
class OutputAlignment(RowColumnSolver):
    """Options of the published form.

    Attributes:
        rounds: how often codes and scales take turns.
        scope: which linear layers the target is for: `last`, those of the last group of each block, all others then
            being fitted to their weights; or `all`.
        amp: gate updates so that none lowers the similarity of token interactions (lit_binq.solvers.baselines.amp).
    """

    scope: Literal["all", "last"] = "last"
    amp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("all", "last"):
            raise LitBinqError(f"solver.scope: got {self.scope!r}, expected `all` or `last`")

    def solve(self, problem: Problem) -> RowColumn:
        """Fit a row x column weight; see the base class.

        Raises:
            LitBinqError: as the base class; `amp` under an objective that does not collect both streams.
        """
        origin = problem.origin
        if origin is None:
            raise ValueError("OutputAlignment: got a problem without its origin")
        if self.scope == "last" and not origin.last:
            W = origin.weight.detach().float()
            return super().solve(Problem(W, torch.eye(W.shape[1], device=W.device)))
        if not self.amp:
            return super().solve(problem)
        T, H = problem.finite()
        cross = torch.zeros_like(H) if origin.cross is None else origin.cross
        return self._gated(T, H, amp_metric(origin.weight, cross))

    def _gated(self, T: Tensor, H: Tensor, M: Tensor) -> RowColumn:
        """The rounds of the row x column solver, each update through the gate."""
        TH, solution = T @ H, start(T, START_ITERATIONS)
        for _ in range(self.rounds):
            solution = gated_codes(solution, TH, H, M)
            solution = gate_rows(solution, update_row_scales(solution, TH, H), M)
            solution = gate_columns(solution, update_column_scales(solution, TH, H), TH, H, M)
        return gate_rows(solution, update_row_scales(solution, TH, H), M) if self.rounds else solution
