"""Zones of a block of columns: which columns are salient, which of the other weights are large, and levels for each.

Legend: w (N, b) a block of the target, P (N, b) >= 0 the saliency of its weights. Three parts p share the block:
    0  small    weights of columns that are not salient, P below the split
    1  large    weights of columns that are not salient, P at or above it
    2  salient  all weights of the salient columns
A part has a mask M (N, b) and stands for the values c_j (m_i + sum_o a_oi B_oij) with a mean m (N,), one size a (N,)
for each order o (small and large: one, salient: two), signs B (N, b), and column scales c (b,) that parts share.

Sources: BiLLM (arXiv 2402.04291) for the split and its searches, as its code makes them; ARB-LLM (arXiv 2410.03129)
for the alternation. As there, both searches are made on the saliency itself: P is binarized and its own error counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_binq.formats.base import half_scales
from lit_binq.formats.dense_only import CountedSolution
from lit_binq.formats.packing import packed_width

MOST_SALIENT = 49
"""Most salient columns of a block that the search tries."""
QUANTILES = 81
"""Magnitude splits that the search tries: quantiles from 0.10 to 0.90."""


@dataclass
class Levels(CountedSolution):
    """Two bits a weight, which pick one of four levels of its row, block of columns and zone, times a column scale.

    With g columns a block and two zones, salient columns and others, G = 2 ceil(K / g) and

        W^_ij = L[i, 2 (j // g) + s_j, code_ij] c_j

    True bits: 2 + 64 G / K, a bitmap of K bits, and 16 K bits for column scales if there are any: 3.0 for g = 128.

    Attributes:
        levels: (N, G, 4) float.
        codes: (N, K) uint8, 0 to 3.
        group: g.
        salient: (K,) bool, s.
        c: (K,) column scales, float; None for none.
    """

    levels: Tensor
    codes: Tensor
    group: int
    salient: Tensor
    c: Tensor | None = None

    def dense(self) -> Tensor:
        """(N, K)."""
        places = 2 * (torch.arange(len(self.salient), device=self.levels.device) // self.group) + self.salient.long()
        W = self.levels.flatten(1).gather(1, 4 * places + self.codes.long())
        return W if self.c is None else W * self.c

    def rounded(self) -> "Levels":
        """Levels and column scales as float16 holds them, column scales of geometric mean about 1."""
        levels, c = self.levels, self.c
        if c is not None and bool((c != 0).any()):
            shift = torch.exp2(torch.round(c.abs()[c != 0].log2().mean()))
            levels, c = levels * shift, c / shift
        half = None if c is None else half_scales(c, "col_scale").float()
        return Levels(half_scales(levels, "levels").float(), self.codes, self.group, self.salient, half)

    def stored_bits(self) -> int:
        """Two planes of codes, levels, the bitmap, column scales."""
        N, K = self.codes.shape
        bits = 2 * N * 8 * packed_width(K) + 16 * self.levels.numel() + 8 * packed_width(K)
        return bits if self.c is None else bits + 16 * K


def first_order(P: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row mean m and a = mean |P - m| of the masked weights, zero in rows without any, and their number n.

    Args:
        P: (N, b).
        mask: (N, b) bool; None takes all.

    Returns:
        m, a, n, each (N,).
    """
    M = torch.ones_like(P) if mask is None else mask.to(P.dtype)
    n = M.sum(1)
    m = (P * M).sum(1) / n.clamp_min(1)
    a = ((P - m[:, None]).abs() * M).sum(1) / n.clamp_min(1)
    return m, a, n


def _gain(P: Tensor, orders: int) -> Tensor:
    """What binarizing all of P (N, b) with means, `orders` times over, takes off |P|^2; float64 scalar.

    One order takes off n (m^2 + a^2) a row: the error is the variance of |P - m|.
    """
    gain = torch.zeros((), dtype=torch.float64, device=P.device)
    for _ in range(orders):
        m, a, n = first_order(P)
        gain = gain + (n.double() * (m.double().square() + a.double().square())).sum()
        P = P - m[:, None]
        P = P - a[:, None] * torch.where(P >= 0, 1.0, -1.0)
    return gain


def salient_columns(P: Tensor, most: int = MOST_SALIENT) -> Tensor:
    """(b,) bool: the first columns by falling sum of P, their number being the best of 1 to `most`.

    A number is as good as P's error is small when both sides, the salient columns and the rest, are binarized twice.

    Args:
        P: (N, b) saliency.
        most: most columns; at least one stays outside.
    """
    b = P.shape[1]
    chosen = torch.zeros(b, dtype=torch.bool, device=P.device)
    most = min(most, b - 1)
    if most < 1:
        return chosen
    order = P.sum(0).argsort(descending=True, stable=True)
    sorted_P = P[:, order]
    gains = torch.stack([_gain(sorted_P[:, :i], 2) + _gain(sorted_P[:, i:], 2) for i in range(1, most + 1)])
    chosen[order] = torch.arange(b, device=P.device) <= gains.argmax()
    return chosen


def large_weights(P: Tensor, salient: Tensor) -> Tensor:
    """(N, b) bool: weights outside the salient columns whose P is at or above the best split.

    The splits tried are quantiles of P with the salient columns set to zero and counted, as in BiLLM's code.

    Args:
        P: (N, b) saliency.
        salient: (b,) bool.
    """
    flat = torch.where(salient, 0.0, P).flatten().sort().values
    place = torch.linspace(0.10, 0.90, QUANTILES, dtype=torch.float64, device=P.device) * (len(flat) - 1)
    low = place.floor().long()
    splits = torch.lerp(flat[low].double(), flat[place.ceil().long()].double(), place - low).to(P.dtype)
    rest = P[:, ~salient]
    gains = []
    for split in splits:
        gain = torch.zeros((), dtype=torch.float64, device=P.device)
        for mask in (rest < split, rest >= split):
            m, a, n = first_order(rest, mask)
            gain = gain + (n.double() * (m.double().square() + a.double().square())).sum()
        gains.append(gain)
    return (splits[torch.stack(gains).argmax()] <= P) & ~salient


@dataclass
class Part:
    """One part of a block, see the head of this file.

    Attributes:
        mask: (N, b), 0 or 1, float.
        m: (N,) means.
        a: one or two sizes, (N,) each.
        B: as many planes of signs, (N, b) each; they say nothing outside the mask.
    """

    mask: Tensor
    m: Tensor
    a: list[Tensor]
    B: list[Tensor]

    @classmethod
    def start(cls, w: Tensor, mask: Tensor, orders: int, *, means: bool) -> "Part":
        """Binarize the masked weights with row mean and mean |w - m|, a second order doing the same to what is left.

        Both orders' means add up to one. Without `means` they are zero.
        """
        M = mask.to(w.dtype)
        part, rest = cls(M, torch.zeros_like(w[:, 0]), [], []), w
        for _ in range(orders):
            m, a, n = first_order(rest, mask)
            if not means:
                m, a = torch.zeros_like(m), (rest.abs() * M).sum(1) / n.clamp_min(1)
            B = torch.where(rest >= m[:, None], 1.0, -1.0).to(w.dtype)
            part.m, part.a, part.B = part.m + m, [*part.a, a], [*part.B, B]
            rest = rest - m[:, None] - a[:, None] * B
        return part

    def value(self) -> Tensor:
        """(N, b): m + sum_o a_o B_o, without column scales, also outside the mask."""
        return self.m[:, None] + sum(a[:, None] * B for a, B in zip(self.a, self.B, strict=True))

    def refine(self, w: Tensor, c: Tensor, *, means: bool) -> None:
        """One round: the best mean, then the best sizes one by one, then the best signs, each for all else given."""
        weight = self.mask * c.square()
        total = weight.sum(1)
        over = torch.where(total > 0, 1 / total, 0.0)
        # Divided by c where that is not zero, the residual is that of an unscaled weight, and c^2 its weight.
        u = torch.where(c == 0, 0.0, w / c)
        if means:
            self.m = self.m + (weight * (u - self.value())).sum(1) * over
        for o, B in enumerate(self.B):
            self.a[o] = self.a[o] + (weight * (u - self.value()) * B).sum(1) * over
        u = u - self.m[:, None]
        if len(self.a) == 1:
            self.B = [_sign_of(u * self.a[0][:, None])]
            return
        a0, a1 = (a[:, None] for a in self.a)
        # Given its first sign, the best second one follows; compare the two ways.
        second = {s: _sign_of((u - s * a0) * a1) for s in (1.0, -1.0)}
        plus = (u - a0 - a1 * second[1.0]).abs() <= (u + a0 - a1 * second[-1.0]).abs()
        self.B = [torch.where(plus, 1.0, -1.0).to(w.dtype), torch.where(plus, second[1.0], second[-1.0])]


def _sign_of(t: Tensor) -> Tensor:
    return torch.where(t >= 0, 1.0, -1.0).to(t.dtype)


def fit_parts(
    w: Tensor, salient: Tensor, large: Tensor, *, iterations: int, means: bool, column_scales: bool
) -> Levels:
    """Levels of a block whose zones are given.

    Args:
        w: (N, b).
        salient: (b,) bool.
        large: (N, b) bool, none of it in a salient column.
        iterations: rounds of the alternation; 0 leaves the first binarization (BiLLM).
        means: whether parts have means.
        column_scales: whether columns have scales, updated last in each round.

    Returns:
        A one-block solution with two zones, g = b.
    """
    N, b = w.shape
    masks = (~large & ~salient, large, salient.expand(N, b))
    small, big, marked = parts = [
        Part.start(w, mask, orders, means=means) for mask, orders in zip(masks, (1, 1, 2), strict=True)
    ]
    c = torch.ones_like(w[0])
    for _ in range(iterations):
        for part in parts:
            part.refine(w, c, means=means)
        if column_scales:
            value = torch.stack([part.mask * part.value() for part in parts]).sum(0)
            square = value.square().sum(0)
            c = torch.where(square > 0, (w * value).sum(0) / square, c)

    def stack(levels: list[Tensor]) -> Tensor:
        return torch.stack(levels, 1)

    (a_s,), (a_b,), (a_1, a_2), m = small.a, big.a, marked.a, marked.m
    plain = stack([small.m - a_s, small.m + a_s, big.m - a_b, big.m + a_b])
    twice = stack([m - a_1 - a_2, m + a_1 - a_2, m - a_1 + a_2, m + a_1 + a_2])
    sign = torch.where(salient, marked.B[0], torch.where(large, big.B[0], small.B[0]))
    selector = torch.where(salient, marked.B[1] > 0, large)
    codes = (sign > 0).to(torch.uint8) + 2 * selector.to(torch.uint8)
    return Levels(torch.stack((plain, twice), 1), codes, b, salient, c if column_scales else None)
