"""Solvers: from a problem, T and H, to a format; one method a file.

Every solver is known to the command line by its class name: `closed_form.solver: PlanesSolver`.
"""

from lit_binq.solvers.base import Origin, Problem, Solver, objective_value
from lit_binq.solvers.baselines.arb import ARB
from lit_binq.solvers.baselines.arb_rc import ARBRC
from lit_binq.solvers.baselines.arb_x import ARBX
from lit_binq.solvers.baselines.billm import BiLLM
from lit_binq.solvers.baselines.cgb import CGB
from lit_binq.solvers.baselines.output_alignment import OutputAlignment
from lit_binq.solvers.baselines.pb_llm import PBLLM
from lit_binq.solvers.gptq2 import UniformTwoBitSolver
from lit_binq.solvers.grouped import GroupedSolver
from lit_binq.solvers.low_rank import LowRankSolver
from lit_binq.solvers.planes import PlanesSolver
from lit_binq.solvers.row_column import RowColumnSolver
from lit_binq.solvers.two_plane import TwoPlaneSolver

__all__ = [
    "ARB",
    "ARBRC",
    "ARBX",
    "CGB",
    "PBLLM",
    "BiLLM",
    "GroupedSolver",
    "LowRankSolver",
    "Origin",
    "OutputAlignment",
    "PlanesSolver",
    "Problem",
    "RowColumnSolver",
    "Solver",
    "TwoPlaneSolver",
    "UniformTwoBitSolver",
    "objective_value",
]
