"""Coordinate descent over the columns of a quantized weight, in panels: what all formats' code updates share.

Legend: T (N, K) target, H (K, K) metric, W^ (N, K) the quantized weight, G = (T - W^) H the residual;
f = tr((T - W^) H (T - W^)^T).

With all other columns fixed, f is least in column j where W^_ij = w_ij + G_ij / H_jj, w_ij the weight as it stands. A
format puts its value there that serves best, all rows at once, and goes on to the next column with the residual that
leaves. So one pass after another lowers f.

The panels are ours: a step brings up to date the residual of a few columns only, matrix products do the rest. All is
kept transposed, (K, N), so that the column a step works on is contiguous.
"""

from typing import Protocol

import torch
from torch import Tensor

# Columns a panel, on two levels. A step updates the residual of its inner panel only, an inner panel's end that of
# its outer panel, an outer panel's end everything. 16 x N floats stay in the first-level cache and below the size
# at which torch starts threads (a thread start costs more than the step); 128 makes the big product efficient.
INNER, OUTER = 16, 128


class Step(Protocol):
    """One column's new weights."""

    def __call__(self, j: int, weights: Tensor, residual: Tensor, out: Tensor) -> object:
        """Set `out`.

        Args:
            j: the column.
            weights: (N,), W^_j as it stands.
            residual: (N,), G_j.
            out: (N,), uninitialised; takes the new W^_j.
        """


def descend_columns(W: Tensor, G: Tensor, H: Tensor, step: Step, *, inner: int = INNER, outer: int = OUTER) -> Tensor:
    """One pass over all columns from left to right, each with the residual that all before it have left.

    Args:
        W: (K, N), the weight transposed; not written to.
        G: (K, N), its residual transposed, brought up to date in place.
        H: (K, K).
        step: called once for each column.
        inner: columns of a panel that every step updates.
        outer: columns of a panel that every inner panel updates. The result depends on neither but for rounding.

    Returns:
        (K, N), the new weight transposed.
    """
    K, new = len(W), torch.empty_like(W)
    for o0 in range(0, K, outer):
        o1 = min(o0 + outer, K)
        for i0 in range(o0, o1, inner):
            i1 = min(i0 + inner, o1)
            panel, h = G[i0:i1], H[i0:i1, i0:i1].contiguous()
            for j in range(i0, i1):
                step(j, W[j], panel[j - i0], new[j])
                panel.addr_(h[j - i0], new[j] - W[j], alpha=-1)
            moved = new[i0:i1] - W[i0:i1]
            G[o0:i0].addmm_(H[o0:i0, i0:i1], moved, alpha=-1)
            G[i1:o1].addmm_(H[i1:o1, i0:i1], moved, alpha=-1)
        moved = new[o0:o1] - W[o0:o1]
        G[:o0].addmm_(H[:o0, o0:o1], moved, alpha=-1)
        G[o1:].addmm_(H[o1:, o0:o1], moved, alpha=-1)
    return new
