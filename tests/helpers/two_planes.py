"""What the tests of the two-plane format share: random weights, and the format by its definition."""

import torch
from torch import Tensor

from lit_binq.formats import InputFormat, TwoPlane
from lit_binq.formats.activations import plain_scales


def half(t: Tensor) -> Tensor:
    """Values that float16 holds, so that packing rounds nothing."""
    return t.half().float()


def weight(
    N: int, K: int, *, levels: int = 4, group: int = 8, P: int = 0, bits: int = 0, static: bool = False, seed: int = 0
) -> TwoPlane:
    """A random weight, its levels in no order; P outliers, inputs of `bits`."""
    g = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(K, generator=g)[:P].sort().values
    scales = half(plain_scales() * (1 + 0.1 * torch.randn(5, generator=g))) if bits == 4 else None
    fixed = torch.tensor([-2.0, 4.5, -3.0, 6.0]) if static else None
    numbers = half(torch.randn(N, -(-K // group), levels, generator=g))
    code = torch.randint(4, (N, K), generator=g).to(torch.uint8)
    return TwoPlane(numbers, code, group, InputFormat(bits, outliers, scales, fixed))


def element_by_element(s: TwoPlane) -> Tensor:
    """The dense weight from the format's definition, columns in the input's order."""
    outliers = s.inputs.outliers.tolist()
    N, K = s.codes.shape
    order = outliers + [j for j in range(K) if j not in outliers]
    W = torch.zeros(N, K)
    for i in range(N):
        for place, j in enumerate(order):
            numbers, code = s.levels[i, place // s.group], int(s.codes[i, place])
            if len(numbers) == 4:
                W[i, j] = numbers[code]
            else:
                A, B = code % 2 * 2 - 1, code // 2 * 2 - 1
                W[i, j] = (numbers[0] if len(numbers) == 3 else 0) + A * numbers[-2] + B * numbers[-1]
    return W


def quantized(x: Tensor, inputs: InputFormat) -> Tensor:
    """x^ of x (M, K), from the definition, columns in the input's order."""
    x = x.clone()
    if inputs.activation_bits == 0:
        return x
    special = torch.zeros(x.shape[1], dtype=torch.bool)
    special[inputs.outliers] = True
    if inputs.activation_bits == 8:
        special[:] = True
    for row in x:
        for part, first in ((special, 2), (~special, 0)):
            if not part.any():
                continue
            v = row[part]
            lo, R = (v.min(), v.max() - v.min()) if inputs.range is None else inputs.range[first : first + 2]
            if first == 2:
                row[part] = lo + (R / 255) * ((v - lo) / (R / 255)).round().clamp(0, 255) if R > 0 else lo
            else:
                assert inputs.scales is not None
                patterns = torch.tensor([[1, *(b >> k & 1 for k in range(4))] for b in range(16)]).float()
                table = (patterns @ inputs.scales.float()).sort().values
                u = (v - lo) / R if R > 0 else torch.zeros_like(v)
                row[part] = lo + R * table[(u[:, None] - table).abs().argmin(1)]
    return x
