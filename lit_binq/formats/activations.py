"""Inputs of a linear layer, quantized token by token to four or eight binary planes.

Legend: K columns in stored order, the first P of them outliers (the 8-bit part, everything with 8 bits), the others the
4-bit part; of one token and one part, lo its lowest value and R its range, or both fixed beforehand (static):

    8-bit part    x^ = lo + (R / 255) q                          q = 0..255, nearest
    4-bit part    x^ = lo + R lambda_b                           b = 0..15, bits b_0..b_3
                  lambda_b = zeta + sum_k rho_k b_k,   u = (x - lo) / R,   b = the pattern with lambda_b nearest to u

Plain asymmetric INT4 is zeta = 0, rho_k = 2^k / 15. Fitting zeta and rho to data ("scale smoothing") makes the sixteen
levels uneven while a product with binary weights stays four times AND and popcount:

    x^_j = z + sum_k a_k q_jk,    z = lo + R zeta, a_k = R rho_k   or   z = lo, a_k = 2^k R / 255, k = 0..7

Source: arXiv 2504.05352, W(1+1)A(1x4): per-token asymmetric INT4, its four plane scales re-fitted, outlier channels at
8 bits. What the scales are fitted to, whether the offset is too, and how ties break is ours: of the paper, only its
abstract and descriptions at second hand were available.

All arithmetic is float32, whatever the dtype of x and with autocast on or off. Values must stay below 1.7e38 in size.
Nothing here synchronizes with a device or has a shape that depends on data, but `fit_scales`: a forward and backward
pass can be captured as a CUDA graph. Knows nothing but torch.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FULL_BITS = 16
"""What a value that is not quantized counts as, where bits of activations are averaged (the A16 of W(1+1)A16)."""


def plain_scales() -> Tensor:
    """zeta = 0 and rho_k = 2^k / 15, plain asymmetric INT4: (5,) float32."""
    return torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]) / 15.0


def plane_levels(scales: Tensor) -> Tensor:
    """lambda_b of the patterns b = 0..15, added up in float32 in the order zeta, k = 0, 1, 2, 3.

    Args:
        scales: (5,) float, zeta and rho_0..rho_3.

    Returns:
        (16,) float32.
    """
    scales = scales.float()
    level = scales[:1]
    for k in range(4):
        # Doubling appends the patterns with bit k set, so that every pattern adds its planes in ascending k.
        level = torch.cat([level, level + scales[k + 1]])
    return level


def mean_bits(in_features: int, bits: int, outliers: int) -> float:
    """Bits of a layer's input, averaged over its columns; `FULL_BITS` where it is not quantized.

    Args:
        in_features: K.
        bits: 0, 4 or 8.
        outliers: P, read with 4 bits only.
    """
    if bits == 4:
        return (8 * outliers + 4 * (in_features - outliers)) / in_features
    return float(bits or FULL_BITS)


def quantize(x: Tensor, *, bits: int, outliers: int, scales: Tensor, input_range: Tensor) -> Tensor:
    """Every value of x replaced by the nearest one that the format can hold.

    Backward, the gradient passes on to x as it is (straight-through), and `scales` gets the true derivative of x^ with
    the codes held fixed.

    Args:
        x: (..., K) float, columns in stored order.
        bits: 0 leaves x as it is; 4; 8.
        outliers: P, columns at 8 bits; read with 4 bits only.
        scales: (5,) float, zeta and rho_0..rho_3; read with 4 bits only.
        input_range: (4,) float, lo and R of the 4-bit part, lo and R of the 8-bit part; empty for per-token ranges.

    Returns:
        (..., K), x's dtype.

    Raises:
        ValueError: other bits, more outliers than columns, or scales or ranges of another shape.
    """
    check(x.shape[-1], bits, outliers, scales, input_range)
    if bits == 0:
        return x
    return _Quantize.apply(x, bits, outliers, scales, input_range)


def codes(x: Tensor, *, bits: int, outliers: int, scales: Tensor, input_range: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers that `quantize` replaces x by, and what they mean.

    Args:
        x: as for `quantize`, as all others; bits 4 or 8.

    Returns:
        q (..., K) uint8: 0..255 in the 8-bit part, in the 4-bit part the pattern b, whose bit k is b_k;
        lo (..., 2) float32 and R (..., 2) float32 of each token: of the 4-bit part, of the 8-bit part. Zero for a part
        without columns.

    Raises:
        ValueError: as `quantize`, or bits 0, which has no codes.
    """
    check(x.shape[-1], bits, outliers, scales, input_range)
    if bits == 0:
        raise ValueError("activation bits 0 have no codes, expected 4 or 8")
    x = x.detach().float()
    none = x.new_zeros(*x.shape[:-1], 1)
    q, los, ranges = [], [none, none], [none, none]
    for part, values in _parts(x, bits, outliers):
        los[part], ranges[part] = _range(values, part, input_range)
        assign = _four_bits if part == 0 else _eight_bits
        q.append(assign(values, los[part], ranges[part], scales)[0])
    return torch.cat(q, -1), torch.cat(los, -1), torch.cat(ranges, -1)


def check(columns: int, bits: int, outliers: int, scales: Tensor, input_range: Tensor) -> None:
    """Refuse options that do not fit a layer of `columns` columns.

    Raises:
        ValueError: see `quantize`.
    """
    if bits not in (0, 4, 8):
        raise ValueError(f"activation bits {bits}, expected 0, 4 or 8")
    if not 0 <= outliers <= columns:
        raise ValueError(f"{outliers} outlier columns of {columns}, expected from 0 to all")
    if bits == 4 and scales.shape != (5,):
        raise ValueError(f"plane scales of shape {tuple(scales.shape)}, expected (5,)")
    if bits and input_range.shape not in ((0,), (4,)):
        raise ValueError(
            f"input range of shape {tuple(input_range.shape)}, expected (4,), or (0,) for per-token ranges"
        )


def _parts(x: Tensor, bits: int, outliers: int) -> list[tuple[int, Tensor]]:
    """The parts of x that have columns, in stored order: (0 for four bits or 1 for eight, values)."""
    split = x.shape[-1] if bits == 8 else outliers
    parts = [(1, x[..., :split]), (0, x[..., split:])]
    return [(part, values) for part, values in parts if values.shape[-1]]


def _range(x: Tensor, part: int, input_range: Tensor) -> tuple[Tensor, Tensor]:
    """lo and R (..., 1) of each token."""
    if input_range.numel():
        fixed = input_range.detach().float()[2 * part : 2 * part + 2].expand(*x.shape[:-1], 2)
        return fixed[..., :1], fixed[..., 1:]
    lo = x.amin(-1, keepdim=True)
    return lo, x.amax(-1, keepdim=True) - lo


def _eight_bits(x: Tensor, lo: Tensor, R: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values float32 of the 8-bit part."""
    step = R / 255
    # A range of zero, or one so small that its step is: the code is 0, the value lo.
    q = torch.where(step > 0, (x - lo) / step, 0.0).round().clamp(0, 255)
    return q.to(torch.uint8), lo + step * q


def _four_bits(x: Tensor, lo: Tensor, R: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values float32 of the 4-bit part."""
    level, pattern = plane_levels(scales.detach()).sort(stable=True)
    u = torch.where(R > 0, (x - lo) / R, 0.0)
    # The nearest level is the one with as many midpoints strictly below u: of two equally near, the lower.
    index = torch.bucketize(u.contiguous(), (level[1:] + level[:-1]) * 0.5, out_int32=True)
    return pattern.to(torch.uint8)[index], lo + R * level[index]


class _Quantize(torch.autograd.Function):
    """x^ of x; see `quantize` for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, outliers: int, scales: Tensor, input_range: Tensor) -> Tensor:
        out, kept = [], [x.new_empty(0), x.new_empty(0)]
        for part, values in _parts(x.float(), bits, outliers):
            lo, R = _range(values, part, input_range)
            q, x_hat = (_eight_bits, _four_bits)[part == 0](values, lo, R, scales)
            out.append(x_hat)
            if part == 0 and ctx.needs_input_grad[3]:
                kept = [q, R]
        ctx.save_for_backward(*kept)
        ctx.dtype = scales.dtype
        return torch.cat(out, -1).to(x.dtype)  # autocast knows no concatenation of float16 on a CPU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[3]:
            return grad, None, None, None, None
        q, R = ctx.saved_tensors
        if not q.numel():  # no 4-bit part
            return grad, None, None, grad.new_zeros(5, dtype=ctx.dtype), None
        slope = grad[..., -q.shape[-1] :].float() * R  # of lambda
        sums = [slope.sum()] + [(slope * ((q >> k) & 1)).sum() for k in range(4)]
        return grad, None, None, torch.stack(sums).to(ctx.dtype), None


MARGINS, RATIOS = (0.0, 0.04, 0.1), (2.0, 1.7, 1.45, 1.25)
"""Where `fit_scales` starts: shares of the range left out at either end, and ratios of one plane's scale to the next.

At 2 levels are evenly spread. Below they crowd in the middle, as values do: sums of four signs with sizes that differ
less and less come ever closer to a bell.
"""


@torch.no_grad()
def fit_scales(
    samples: Tensor,
    weight: Tensor | None = None,
    rounds: int = 20,
    *,
    tokens: Tensor | None = None,
    input_range: Tensor | None = None,
) -> Tensor:
    """Plane scales that lower the error sum_tj tokens_t weight_j |x_tj - x^_tj|^2 over sample tokens t.

    Alternates between the nearest level of every value and weighted least squares for zeta and rho, from several
    starts, and keeps the best scales seen, judged as float16 stores them. An error in u is one of R in x, so tokens
    count by R^2.

    Args:
        samples: (M, K_4) float, the 4-bit part of M tokens.
        weight: (K_4,) float, non-negative weight of each column's error; None for all alike.
        rounds: alternations at most, from each start.
        tokens: (M,) float, non-negative weight of each token; None for all alike.
        input_range: lo and R, fixed for all tokens, (2,) float or the whole (4,); None or empty for each token's own.

    Returns:
        (5,) float32 on the CPU, values that float16 holds exactly; never worse on the samples than `plain_scales`
        rounded to float16, which is what no samples give.

    Raises:
        ValueError: weights of another length, or negative ones.
    """
    best = plain_scales().half().float()
    if not samples.numel():
        return best
    x = samples.float()
    lo, R = _range(x, 0, x.new_empty(0) if input_range is None else input_range.to(x.device))
    u = torch.where(R > 0, (x - lo) / R, 0.0)
    points = WeightedPoints(u, outer_weights(x, tokens, weight) * R.double().square())
    lowest = points.error(plane_levels(best))
    for margin, ratio in itertools.product(MARGINS, RATIOS):
        rho = ratio ** torch.arange(4.0)
        scales = torch.cat([torch.tensor([margin]), rho * (1 - 2 * margin) / rho.sum()])
        last = float("inf")
        for _ in range(rounds + 1):
            stored = scales.half().float()
            error = points.error(plane_levels(stored))
            if error < lowest:
                best, lowest = stored, error
            if not error < last * (1 - 1e-6):
                break
            last = error
            scales = _least_squares(points, scales)
    return best


def outer_weights(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The weight of every value of a matrix x: (M, K) float64, the product of its row's and its column's.

    Raises:
        ValueError: weights of another length, or negative ones.
    """
    total = torch.ones(x.shape, dtype=torch.float64, device=x.device)
    for weights, axis in ((rows, 0), (columns, 1)):
        if weights is None:
            continue
        if weights.shape != (x.shape[axis],) or bool((weights < 0).any()):
            raise ValueError(f"weights of shape {tuple(weights.shape)}, expected {x.shape[axis]} numbers >= 0")
        total *= weights.to(x.device, torch.float64).unsqueeze(1 - axis)
    return total


_BITS = torch.tensor([[1.0, *(float(b >> k & 1) for k in range(4))] for b in range(16)], dtype=torch.float64)
"""(16, 5): lambda = _BITS @ scales."""


def _least_squares(points: "WeightedPoints", scales: Tensor) -> Tensor:
    """The best scales (5,) float32 for the assignment that `scales` gives."""
    n, first, _ = points.moments(plane_levels(scales))
    A = _BITS.T @ (n[:, None] * _BITS)
    # Planes that no point uses leave A singular; of all solutions, the one that changes the scales least.
    right = _BITS.T @ (first - n * (_BITS @ scales.double()))
    return (scales.double() + torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ right).float()


class WeightedPoints:
    """Weighted points on a line, sorted once, so that giving all of them to levels is a look-up for each level.

    Args:
        u: float32, any shape.
        weights: float64, of u's shape, non-negative.
    """

    def __init__(self, u: Tensor, weights: Tensor) -> None:
        u, order = u.flatten().sort(stable=True)
        # Summed on the host: on a device the rounding of running sums may differ from run to run.
        self.u, w = u.cpu(), weights.flatten()[order].cpu()
        w = w / w.max().clamp_min(1e-300)
        sums = torch.stack([w, w * self.u, w * self.u.double() ** 2])
        self.sums = torch.nn.functional.pad(sums.cumsum(1), (1, 0))  # (3, points + 1)

    def moments(self, levels: Tensor) -> Tensor:
        """Summed weight, w u and w u^2 of the points nearest to each level; ties go to the lower one.

        Args:
            levels: (L,) float32 on the host, in any order.

        Returns:
            (3, L) float64, weights relative to the largest.
        """
        levels, order = levels.sort(stable=True)
        ends = torch.searchsorted(self.u, (levels[1:] + levels[:-1]) * 0.5, right=True)
        cuts = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(self.u))])
        moments = torch.empty(3, len(levels), dtype=torch.float64)
        moments[:, order] = self.sums[:, cuts[1:]] - self.sums[:, cuts[:-1]]
        return moments

    def error(self, levels: Tensor) -> float:
        """Sum of w (u - nearest level)^2, weights relative to the largest."""
        n, first, second = self.moments(levels)
        level = levels.double()
        return float((second - 2 * level * first + level**2 * n).sum())
