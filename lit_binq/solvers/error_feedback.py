"""Codes of a row x column weight by error feedback, see `lit_binq.statistics.error_feedback`."""

import torch
from torch import Tensor

from lit_binq.formats.row_column import RowColumn
from lit_binq.statistics.error_feedback import column_by_column, inverse_factor


def feedback_codes(s: RowColumn, T: Tensor, H: Tensor, *, damping: float = 0.0) -> RowColumn:
    """Codes of a row x column weight by error feedback, for its scales as they are.

    Args:
        s: scales r (N,) and c (K,); its codes are not read.
        T: (N, K) target.
        H: (K, K) metric.
        damping: see `lit_binq.statistics.error_feedback.inverse_factor`.
    """

    def quantize(w: Tensor, j: int) -> Tensor:
        size = s.r * s.c[j]
        return torch.where(w * size >= 0, size, -size)

    Q = column_by_column(T, inverse_factor(H, damping), quantize)
    return RowColumn(s.r, s.c, torch.where(Q * s.r[:, None] * s.c >= 0, 1.0, -1.0).to(T.dtype))
