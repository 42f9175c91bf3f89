"""How the inputs of a group of linear layers are quantized: outlier channels, plane scales and ranges, from a sample.

Legend: x~ (M, K) sampled tokens of the quantized stream, omega (M,) their weights; the group's layers share x~, and
    e_j = sum over the layers of |W_:,j|^2              (K,) energies: what an error in x_j costs at their outputs
    E = sum_t omega_t sum_j e_j (x~_tj - x^_tj)^2       the error at the outputs, errors taken as independent

The choice of outlier channels (those at 8 bits) is hard because a channel matters in two ways: by its own error, and
by stretching the range, hence the error, of every other channel. Several sets are proposed and the one with the lowest
E on the sample is taken:

- by credit: eight channels at a time. A token's range is shared out among the channels at its two ends as the Shapley
  value does it (the airport game): the step from the i-th to the (i+1)-th greatest value is due to the i greatest
  alike. So channels that stretch the range only together get credit too, where one by one none would;
- by energy e_j E[x_j^2], by size E[x_j^2], and by the greatest |x_j|.

Source: arXiv 2504.05352 keeps 128 channels at INT8. How they are chosen, and all of this file, is ours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats.activations import (
    WeightedPoints,
    fit_scales,
    outer_weights,
    plain_scales,
    plane_levels,
    quantize,
)
from lit_binq.formats.two_plane.linear import InputFormat, stored_order

STEP = 8
"""Outliers come in whole bytes of the stored planes."""

MOST = 4
"""At most one of so many columns of a layer may be an outlier."""

AT_THE_ENDS = 16
"""Values at either end of a token's range that share in it."""

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.29, 0.24, 0.2, 0.15, 0.1, 0.07, 0.05)
"""What shares of a side are tried while a fixed range is fitted."""


@dataclass
class Activations:
    """How inputs of linear layers are quantized; for formats that can (`two_plane`).

    Attributes:
        bits: 0 (not at all), 4 or 8. The output layer and the embeddings are never concerned.
        outliers: with 4 bits, how many channels of every linear's input stay at 8, a multiple of 8. A layer whose input
            is narrow gets fewer: at most a quarter of its columns, rounded down to a multiple of 8.
        outliers_by: `objective` chooses the channels that lower the error at the layers' outputs most; `size` those
            with the greatest mean square.
        refit: with 4 bits, fit the scales of the four planes to data (scale smoothing); false leaves the sixteen levels
            evenly spaced.
        static: fix the range of values from data; false takes each token's own, which costs a pass over it.

    Raises:
        LitBinqError: a value outside its range.
    """

    bits: Literal[0, 4, 8] = 0
    outliers: int = 0
    outliers_by: Literal["objective", "size"] = "objective"
    refit: bool = True
    static: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (0, 4, 8):
            raise LitBinqError(f"activations.bits: got {self.bits}, expected 0, 4 or 8")
        if self.outliers < 0 or self.outliers % STEP:
            raise LitBinqError(f"activations.outliers: got {self.outliers}, expected 0 or a multiple of {STEP}")
        if self.outliers and self.bits != 4:
            raise LitBinqError(
                f"activations.outliers: got {self.outliers} with {self.bits} bits, expected 0: only with `bits: 4` "
                "some channels stay at 8"
            )
        if self.outliers_by not in ("objective", "size"):
            raise LitBinqError(f"activations.outliers_by: got {self.outliers_by!r}, expected `objective` or `size`")

    def outliers_of(self, in_features: int) -> int:
        """P of a layer with K = `in_features` columns, see `outliers`."""
        return min(self.outliers, in_features // MOST // STEP * STEP)


@torch.no_grad()
def choose_input_format(options: Activations, x: Tensor, energies: Tensor, tokens: Tensor | None = None) -> InputFormat:
    """Outliers, scales and ranges for one group of layers.

    Args:
        options: what is asked for.
        x: (M, K) float, sampled inputs, M >= 1.
        energies: (K,) float, e_j.
        tokens: (M,) float, omega; None for all alike.

    Returns:
        The format, its tensors on x's device.

    Raises:
        ValueError: shapes that do not fit, negative weights.
    """
    if options.bits == 0:
        return InputFormat()
    x, energies = x.detach().float(), energies.detach().double()
    tokens = torch.ones(len(x), device=x.device) if tokens is None else tokens.float()
    P = options.outliers_of(x.shape[1])
    if not P:
        return _fit(options, x, energies, tokens, torch.empty(0, dtype=torch.int64, device=x.device))
    sets = [by_size(x, tokens, P)]
    if options.outliers_by == "objective":
        sets += [
            by_size(x, tokens, P, energies),
            _first(x.abs().amax(0), P),
            by_credit(x, energies, tokens, P),
        ]
    # Scales are fitted to the chosen set only; which set is best they hardly change.
    plain = Activations(options.bits, options.outliers, options.outliers_by, False, options.static)
    formats = [_fit(plain, x, energies, tokens, outliers) for outliers in sets]
    errors = [output_error(x, f, energies, tokens) for f in formats]
    best = min(range(len(sets)), key=errors.__getitem__)
    return _fit(options, x, energies, tokens, sets[best]) if options.refit else formats[best]


def quantized_input(x: Tensor, inputs: InputFormat) -> Tensor:
    """What a packed layer with this format multiplies by, columns in their own order.

    Args:
        x: (..., K) float.
        inputs: the format.

    Returns:
        (..., K), x's dtype.
    """
    P = len(inputs.outliers)
    if not inputs.activation_bits:
        return x
    order = stored_order(inputs.outliers.to(x.device), x.shape[-1])
    scales = plain_scales() if inputs.scales is None else inputs.scales
    x_hat = quantize(
        x.index_select(-1, order) if P else x,
        bits=inputs.activation_bits,
        outliers=P,
        scales=scales.to(x.device).half(),  # as stored
        input_range=x.new_empty(0) if inputs.range is None else inputs.range.to(x.device),
    )
    return x_hat.index_select(-1, order.argsort()) if P else x_hat


def output_error(x: Tensor, inputs: InputFormat, energies: Tensor, tokens: Tensor | None = None) -> float:
    """E of this file's head, divided by sum_t omega_t sum_j e_j x_tj^2.

    Args:
        x: (M, K) float.
        inputs: the format.
        energies: (K,) float.
        tokens: (M,) float, or None for all alike.
    """
    weights = outer_weights(x, tokens, energies)
    error = (weights * (x - quantized_input(x, inputs)).double().square()).sum()
    return float(error / (weights * x.double().square()).sum().clamp_min(1e-300))


# ---- choosing outliers ------------------------------------------------------------------------------------------


def _first(score: Tensor, count: int) -> Tensor:
    """(count,) int64, ascending: the columns with the greatest score; of equal ones the first."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def by_size(x: Tensor, tokens: Tensor, count: int, energies: Tensor | None = None) -> Tensor:
    """The columns with the greatest mean square, times their energy if given: (count,) int64, ascending."""
    size = (tokens.double()[:, None] * x.double().square()).sum(0)
    return _first(size if energies is None else size * energies, count)


def by_credit(x: Tensor, energies: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Columns taken out of the 4-bit part eight at a time, by what the error of the rest owes to them.

    With R_t the range of token t, evenly spread levels have the error R_t^2 (sum of the energies left) / (12 * 15^2).
    A column's credit is its own energy times sum_t omega_t R_t^2, and the share of the range that is due to it.

    Args:
        x: (M, K) float.
        energies: (K,) float64.
        tokens: (M,) float.
        count: P, a multiple of 8 below K.

    Returns:
        (P,) int64, ascending.
    """
    left = torch.arange(x.shape[1], device=x.device)
    chosen = []
    for _ in range(0, count, STEP):
        values, e = x.index_select(1, left), energies.index_select(0, left)
        R = values.amax(1) - values.amin(1)  # (M,)
        credit = e * (tokens.double() * R.double().square()).sum()
        total = torch.zeros(len(left), dtype=torch.float64)
        for side in (values, -values):
            share, where = _shares(side)  # (M, m)
            saved = tokens[:, None] * share * (2 * R[:, None] - share)  # of R^2, if the range shrank by the share
            # On the host, where sums come out the same every time.
            total += torch.bincount(where.flatten().cpu(), saved.double().flatten().cpu(), minlength=len(left))
        credit = credit + e.sum() * total.to(x.device)
        keep = torch.ones(len(left), dtype=torch.bool, device=x.device)
        taken = _first(credit, STEP)
        keep[taken] = False
        chosen.append(left[taken])
        left = left[keep]
    return torch.cat(chosen).sort().values


def _shares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token's greatest value, the parts (M, m) due to its m greatest columns (M, m) int64."""
    m = min(AT_THE_ENDS, x.shape[1] - 1)
    values, where = x.topk(m + 1, dim=1)
    steps = (values[:, :-1] - values[:, 1:]) / torch.arange(1, m + 1, device=x.device)
    return steps.flip(1).cumsum(1).flip(1), where[:, :-1]


# ---- fitting scales and ranges ----------------------------------------------------------------------------------


def _fit(options: Activations, x: Tensor, energies: Tensor, tokens: Tensor, outliers: Tensor) -> InputFormat:
    """Scales and ranges for given outliers."""
    fixed = scales = None
    order, P = stored_order(outliers, x.shape[1]), len(outliers)
    split = P if options.bits == 4 else x.shape[1]
    parts = [(x.index_select(1, part), energies.index_select(0, part)) for part in (order[split:], order[:split])]
    if options.static:
        four, eight = plane_levels(plain_scales()), torch.arange(256) / 255
        ranges = [fit_range(*part, tokens, unit) for part, unit in zip(parts, (four, eight), strict=True)]
        fixed = torch.cat(ranges).to(x.device)
    if options.bits == 4 and options.refit:
        scales = fit_scales(*parts[0], tokens=tokens, input_range=fixed).to(x.device)
    return InputFormat(options.bits, outliers, scales, fixed)


def fit_range(x: Tensor, energies: Tensor, tokens: Tensor, unit: Tensor) -> Tensor:
    """One range for all tokens: clipping the rarest values makes the steps finer for all others.

    Either side of the median is shrunk in turn, by the share that lowers E most.

    Args:
        x: (M, K) float.
        energies: (K,) float.
        tokens: (M,) float.
        unit: (L,) float32 on the host, the levels in a range from 0 to 1.

    Returns:
        (2,) float32 on the host: lo and R; zeros without columns.
    """
    if not x.numel():
        return torch.zeros(2)
    points = WeightedPoints(x, outer_weights(x, tokens, energies))
    ends = points.u[[0, len(points.u) // 2, -1]]
    low, middle, high = ends.unbind()

    def span(shrinks: tuple[float, float]) -> tuple[Tensor, Tensor]:
        lo = middle + shrinks[0] * (low - middle)
        return lo, middle + shrinks[1] * (high - middle) - lo

    def error(shrinks: tuple[float, float]) -> float:
        lo, R = span(shrinks)
        return points.error(lo + R * unit)

    best = (1.0, 1.0)
    for _ in range(3):
        before = best
        best = min(((s, best[1]) for s in SHRINKS), key=error)
        best = min(((best[0], s) for s in SHRINKS), key=error)
        if best == before:
            break
    return torch.stack(span(best)).float()
