"""Error feedback: what quantizing a column does wrong, columns still to come make good.

Legend: T (N, K) target, H (K, K) metric; U upper triangular with H^-1 = U^T U; w_j (N,) column j of the target
with all earlier errors compensated, q_j its quantized value.

    e_j = (w_j - q_j) / U_jj,     w_k <- w_k - e_j U_jk  for k > j

After each step the columns to come are the minimisers of tr((T - W^) H (T - W^)^T) given all columns so far, and the
value of that is sum_j |e_j|^2. So 1 / U_jj^2 is what a unit error in column j costs at least.

Source: GPTQ (arXiv 2210.17323), the Cholesky form of optimal brain surgery, with its lazy blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError


def inverse_factor(H: Tensor, damping: float = 0.0) -> Tensor:
    """U, the upper Cholesky factor of (H + damping * mean(diag H) I)^-1; solved in float64.

    Where that is not positive definite the damping grows tenfold until it is.

    Args:
        H: (K, K), symmetric, positive diagonal.
        damping: share of the mean of H's diagonal.

    Returns:
        (K, K), H's dtype.

    Raises:
        LitBinqError: no damping up to 1000 helps.
    """
    mean = float(H.diagonal().mean())
    attempt = damping
    while attempt <= max(damping, 1e3):
        damped = H.double()  # a copy, unless H is float64
        damped = damped + attempt * mean * torch.eye(len(H), dtype=torch.float64, device=H.device)
        L, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            U, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if int(info) == 0 and bool(torch.isfinite(U).all()):
                return U.to(H.dtype)
        attempt = max(attempt * 10, 1e-6)
    raise LitBinqError(
        "solver: the metric cannot be inverted, expected a positive definite one: raise `closed_form.shrinkage`"
    )


def column_by_column(T: Tensor, U: Tensor, quantize: Callable[[Tensor, int], Tensor], *, width: int = 128) -> Tensor:
    """Quantize columns from left to right, each with the errors of all before it compensated.

    Args:
        T: (N, K) target.
        U: (K, K), see `inverse_factor`.
        quantize: from w_j (N,) and j to q_j (N,).
        width: columns a lazy block; the result depends on it by rounding only.

    Returns:
        (N, K), the quantized values.
    """
    return columns_and_errors(T, U, quantize, width=width)[0]


def columns_and_errors(
    T: Tensor, U: Tensor, quantize: Callable[[Tensor, int], Tensor], *, width: int = 128
) -> tuple[Tensor, Tensor]:
    """The same, with the errors e_j that columns outside T make good: w_k <- w_k - sum_j e_j U_jk.

    Args:
        T: (N, K) target; columns of a wider one, with the errors of all before them compensated.
        U: (K, K), the part of these columns.
        quantize: from w_j (N,) and j to q_j (N,).
        width: columns a lazy block.

    Returns:
        The quantized values (N, K), and the errors transposed (K, N).
    """
    Wt, K = T.T.clone(memory_format=torch.contiguous_format), T.shape[1]  # (K, N): columns contiguous
    Qt, errors = torch.empty_like(Wt), torch.empty_like(Wt)
    for begin in range(0, K, width):
        end = min(begin + width, K)
        for j in range(begin, end):
            Qt[j] = quantize(Wt[j], j)
            errors[j] = (Wt[j] - Qt[j]) / U[j, j]
            Wt[j + 1 : end].addr_(U[j, j + 1 : end], errors[j], alpha=-1)
        Wt[end:].addmm_(U[begin:end, end:].T, errors[begin:end], alpha=-1)
    return Qt.T.contiguous(), errors
