"""ARB-RC: a row scale and a column scale in turns on the weight alone, no mean.

Legend: T (N, K) target; W^ = diag(r) B diag(c). With f = |T - W^|^2 and B = sign(T), which stays the best choice while
scales are positive:

    c_j = sum_i r_i |T_ij| / sum_i r_i^2,    r_i = sum_j c_j |T_ij| / sum_j c_j^2

Source: arXiv 2410.03129. Weight alignment: the metric H says nothing here. It is also where the row x column solver
starts from, whose function it shares. Deviations: columns are updated first, and one scale serves the whole row, not
a block of it within BiLLM's zones; those are lit_binq.solvers.baselines.cgb.
"""

from dataclasses import dataclass

from lit_binq.formats.row_column import RowColumn
from lit_binq.solvers.base import Problem, Solver
from lit_binq.solvers.baselines.arb import ITERATIONS
from lit_binq.solvers.row_column import start


@dataclass
class ARBRC(Solver):
    """ARB-RC, which has no options."""

    def solve(self, problem: Problem) -> RowColumn:
        """Fit row and column scales; see the base class."""
        T, _ = problem.finite()
        return start(T, ITERATIONS)
