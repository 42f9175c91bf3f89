"""AMP, attention matrix preservation: a gate on the updates of a row x column weight.

Legend: W (N, K) full-precision weight, W^ = diag(r) B diag(c), x and x~ the two streams, C = E[x x~^T] (K, K);
    M = C^T W^T W C (K, K),    a(W^) = tr(W^ M W^^T) = |E[(W x) (W^ x~)^T]|^2_F

a is the inner product of the two Grams between tokens, of full-precision outputs and of quantized ones: what attention
sees of them. A parameter's update is accepted only where it does not lower a, otherwise the parameter keeps its value.

Source: arXiv 2512.21651 v1, whose M = X~^T X W W^T X^T X~ is this one for W transposed, times the number of tokens
squared. There the gate's mask is printed with values -1 and +1, which would step backwards where it is closed; it is
read as {0, 1}. How the gate is taken parameter by parameter is our reading:
    rows      a is a sum over rows, so each r_i is decided exactly; so is f = tr((T - W^) H (T - W^)^T)
    codes     within the coordinate descent: a flip must lower f and not lower a, as both stand at that step
    columns   a is convex in c: of the step d to the best c, those d_j with d_j (da / dc_j) >= 0 are kept, so that a
              does not fall along them; what is left of the step is as long as is best for f, at most whole
So no update lowers a, and none raises f.
"""

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.row_column import RowColumn


def amp_metric(W: Tensor, C: Tensor) -> Tensor:
    """M = C^T W^T W C (K, K), in units in which its diagonal has mean 1 (the gate asks for signs only).

    Args:
        W: (N, K) full-precision weight.
        C: (K, K) cross Gram E[x x~^T].

    Raises:
        LitBinqError: C is all zero, as it is for objectives that do not collect it.
    """
    WC = W.detach().double() @ C.double()
    M = WC.T @ WC
    mean = M.diagonal().mean()
    if not bool(mean > 0):
        raise LitBinqError(
            "amp: got a cross Gram of zeros, expected statistics of both streams: "
            "set `closed_form.objective: true_target`"
        )
    return (M / mean).to(W.dtype)


def gate_rows(old: RowColumn, new: RowColumn, M: Tensor) -> RowColumn:
    """`old` with those row scales of `new` that do not lower a: as M is semi-definite, those of no smaller size.

    Args:
        old: before the update.
        new: after it; only r differs.
        M: (K, K).
    """
    q = old.B * old.c
    seen = ((q @ M) * q).sum(1) > 0  # a row that M does not see may do as it likes
    return RowColumn(torch.where((new.r.abs() >= old.r.abs()) | ~seen, new.r, old.r), old.c, old.B)


def gate_columns(old: RowColumn, new: RowColumn, TH: Tensor, H: Tensor, M: Tensor) -> RowColumn:
    """`old` with the part of the step to `new`'s column scales that does not lower a.

    Args:
        old: before the update.
        new: after it; only c differs.
        TH: (N, K), the product T H.
        H: (K, K).
        M: (K, K).
    """
    Br = (old.B * old.r[:, None]).double()
    gram, c = Br.T @ Br, old.c.double()
    step = new.c.double() - c
    step = torch.where(step * ((M.double() * gram) @ c) >= 0, step, 0.0)
    A = H.double() * gram
    slope, curve = step @ ((Br * TH).sum(0) - A @ c), step @ (A @ step)
    length = torch.where((slope > 0) & (curve > 0), slope / curve, 0.0).clamp(max=1.0)
    return RowColumn(old.r, (c + length * step).to(old.c.dtype), old.B)


def gated_codes(s: RowColumn, TH: Tensor, H: Tensor, M: Tensor, *, sweeps: int = 1, width: int = 32) -> RowColumn:
    """Coordinate descent on the codes where each flip must lower f and must not lower a.

    Args:
        s: current solution.
        TH: (N, K), the product T H.
        H: (K, K).
        M: (K, K).
        sweeps: passes over all columns.
        width: columns a panel; the result depends on it by rounding only.
    """
    K = TH.shape[1]
    scale = s.c[:, None] * s.r[None, :]  # (K, N), transposed as in the solver: a column is contiguous
    Bt = s.B.T.clone(memory_format=torch.contiguous_format)
    Gt, At = TH.T - H @ (Bt * scale), M @ (Bt * scale)
    for _ in range(sweeps):
        for begin in range(0, K, width):
            end = min(begin + width, K)
            before = Bt[begin:end].clone()
            for j in range(begin, end):
                delta = -2 * Bt[j] * scale[j]  # what a flip adds to the weight
                square = delta * delta
                lowers = square * H[j, j] - 2 * delta * Gt[j] < 0
                delta = delta * (lowers & (square * M[j, j] + 2 * delta * At[j] >= 0))
                Bt[j] = torch.where(delta != 0, -Bt[j], Bt[j])
                Gt[begin:end].addr_(H[begin:end, j], delta, alpha=-1)
                At[begin:end].addr_(M[begin:end, j], delta)
            moved = (Bt[begin:end] - before) * scale[begin:end]
            for part in (slice(0, begin), slice(end, K)):
                Gt[part].addmm_(H[part, begin:end], moved, alpha=-1)
                At[part].addmm_(M[part, begin:end], moved)
    return RowColumn(s.r, s.c, Bt.T.contiguous())
