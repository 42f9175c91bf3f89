"""CGB: ARB-LLM's alternating updates within BiLLM's zones (its column-group bitmap).

Legend as in lit_binq.solvers.baselines.zones. Blocks, saliency, zones and error feedback are BiLLM's
(lit_binq.solvers.baselines.billm); within each block the levels are then refined as in ARB-RC, without means: row
sizes, then signs of each part, then column scales, in turns. The salient part is of second order: two sizes, each
weight at the nearest of four levels.

Source: arXiv 2410.03129. Deviations: one scale a column, where the authors' code gives each part of a column, and each
order, its own. The zones are searched exactly as BiLLM does. The authors' code can also split the salient zone by
magnitude, which takes a third code bit there: not done here.

True bits: 2 for the codes, 8 levels a row and block, bitmap and column scales: 3.0 at 4096 x 4096. The 2.51 of
ARB-RC with the bitmap has 4 sizes a row and block instead of 8 levels: here the levels are stored that are multiplied,
although those of ARB-RC are symmetric.
"""

from dataclasses import dataclass

from torch import Tensor

from lit_binq.solvers.baselines.arb import ITERATIONS
from lit_binq.solvers.baselines.billm import BiLLM
from lit_binq.solvers.baselines.zones import Levels, fit_parts


@dataclass
class CGB(BiLLM):
    """Options of the column-group bitmap.

    Attributes:
        block: columns a block, and a group of levels.
    """

    def _fit_zones(self, w: Tensor, salient: Tensor, large: Tensor) -> Levels:
        return fit_parts(w, salient, large, iterations=ITERATIONS, means=False, column_scales=True)
