"""CGB: ARB-LLM's alternating updates within BiLLM's zones (its column-group bitmap).

Legend as in lit_binq.solvers.baselines.zones. Blocks, saliency, zones and error feedback are BiLLM's
(lit_binq.solvers.baselines.billm); within each block the levels are then refined:

    scales `row_column` (ARB-RC): no means; row sizes, then signs of each part, then column scales, in turns
    scales `row`        (ARB):    means, row sizes and signs of each part, in turns

The salient part is of second order: two sizes, each weight at the nearest of four levels.

Source: arXiv 2410.03129. Deviations with `row_column`: one scale a column, where the authors' code gives each part
of a column, and each order, its own. The zones are searched exactly as BiLLM does. The authors' code can also split
the salient zone by magnitude, which takes a third code bit there: not done here.

True bits: 2 for the codes, 8 levels a row and block, bitmap and column scales: 3.0 at 4096 x 4096. The 2.51 of
ARB-RC with the bitmap has 4 sizes a row and block instead of 8 levels: here the levels are stored that are multiplied,
although those of ARB-RC are symmetric.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.solvers.baselines.billm import BiLLM
from lit_binq.solvers.baselines.zones import Levels, fit_parts


@dataclass
class CGB(BiLLM):
    """Options of the column-group bitmap.

    Attributes:
        scales: `row_column` (ARB-RC) or `row` (ARB, with means).
        iterations: rounds of the alternation.
        block: columns a block, and a group of levels.
        damping: share of the metric's mean diagonal added to it before it is inverted.
        saliency: `hessian` (w^2 / U_jj^2) or `magnitude` (w^2).
        feedback: whether a block's error is compensated on later blocks.
    """

    scales: Literal["row_column", "row"] = "row_column"
    iterations: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales not in ("row_column", "row"):
            raise LitBinqError(f"solver.scales: got {self.scales!r}, expected `row_column` or `row`")
        if self.iterations < 0:
            raise LitBinqError(f"solver.iterations: got {self.iterations}, expected a number >= 0")

    def _fit(self, w: Tensor, price: Tensor) -> Levels:
        salient, large = self._zones(w, price)
        by_column = self.scales == "row_column"
        return fit_parts(w, salient, large, iterations=self.iterations, means=not by_column, column_scales=by_column)
