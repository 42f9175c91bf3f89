"""Solvers: (T, H) to a format; one method a file. May touch formats, nothing above.

Every solver is known to the command line by its class name: `closed_form.solver: SalientSolver`.
"""

from lit_binq.solvers.base import Solver, objective_value
from lit_binq.solvers.row_column import RowColumnSolver
from lit_binq.solvers.salient import SalientSolver

__all__ = ["RowColumnSolver", "SalientSolver", "Solver", "objective_value"]
