"""What the tests of formats share: one random packed layer of every format, and models made of them."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporting import random_model
from lit_binq.formats import (
    Grouped,
    LowRank,
    PackedLinear,
    Planes,
    RowColumn,
    Solution,
    TwoPlane,
)
from lit_binq.formats.grouped import group_count

VARIANTS = (
    "row_column",
    "planes",
    "planes-nested",
    "grouped-8",
    "grouped-40",
    "low_rank",
    "two_plane-4",
    "two_plane-3",
    "two_plane-2",
)
"""Every format that is deployed, and those of its layouts that are stored differently."""


def _signs(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=g).float() * 2 - 1


def random_solution(variant: str, W: Tensor, g: torch.Generator) -> Solution:
    """A weight (N, K) of a variant: the signs and sizes of W, otherwise random."""
    N, K = W.shape
    kind, _, option = variant.partition("-")
    B, r = torch.where(W >= 0, 1.0, -1.0), W.abs().mean(1)
    c = 0.5 + torch.rand(K, generator=g)
    base = RowColumn(r, c, B)
    if kind == "row_column":
        return base
    if kind == "planes":
        sets = [torch.arange(K) if option else torch.randperm(K, generator=g)[: max(1, K // 5)].sort().values]
        if option == "nested":
            sets.append(torch.randperm(K, generator=g)[: max(1, K // 3)].sort().values)
        further = [RowColumn(0.5**p * r, c[s], _signs((N, len(s)), g)) for p, s in enumerate(sets, 1)]
        return Planes([base, *further], sets)
    if kind == "two_plane":
        numbers = r[:, None, None] * torch.randn(N, group_count(K, 16), int(option), generator=g)
        codes = torch.randint(4, (N, K), generator=g).byte()
        return TwoPlane(numbers, codes, 16).canonical()
    if kind == "grouped":
        scales = r[:, None] * (0.5 + torch.rand(N, group_count(K, int(option)), generator=g))
        return Grouped(scales, B, int(option))
    if kind == "low_rank":
        k = 8 * max(1, min(N, K) // 10)
        v = 0.5 + torch.rand(k, generator=g)
        return LowRank(r / k**0.5, _signs((N, k), g), v, _signs((k, K), g), c)
    raise ValueError(variant)


def random_layer(variant: str, N: int, K: int, *, bias: bool = False, seed: int = 0) -> PackedLinear:
    """A packed layer of its own."""
    g = torch.Generator().manual_seed(seed)
    solution = random_solution(variant, torch.randn(N, K, generator=g), g)
    return solution.pack(torch.randn(N, generator=g) if bias else None)


def packed_variant(architecture: str, variant: str) -> PreTrainedModel:
    """A tiny random model with every linear of its blocks packed; "mixed" takes the variants in turn."""
    model = random_model(architecture, blocks=3 if variant == "mixed" else 2)
    g = torch.Generator().manual_seed(3)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    for i, (name, linear) in enumerate(linears):
        chosen = VARIANTS[i % len(VARIANTS)] if variant == "mixed" else variant
        solution = random_solution(chosen, linear.weight.detach(), g)
        model.set_submodule(name, solution.pack(linear.bias))
    return model
