"""Two-plane products on a GPU by AND and popcount: what the quantized input is made of, and when the kernel can run.

Legend: M rows of x, N rows and K columns of weights, g columns a group, P outlier columns, A, B bits of weights, L
numbers a row and group; q_k binary planes of the input, a_k their sizes, z the offset; columns in stored order.

    x^_j = z + sum_k a_k q_jk = sum_k a_k q_jk,   the last plane all ones and its size z

The 8-bit part (8 planes and the ones) and the 4-bit part (4 and the ones) are products of their own, added up. Counts
are whole numbers, the sums of counts times sizes float32. Knows Triton only where a product is asked for.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from lit_binq.formats import activations


@dataclass
class PlanesPart:
    """The columns of an input that are quantized alike, as binary planes.

    Attributes:
        planes: (M, k + 1, ceil(columns / 8)) uint8, bits as in `lit_binq.formats.packing`, padding clear; the last
            plane is ones.
        sizes: (M, k + 1) float32, a_k and z.
        first: the first column.
        last: the one after the last.
    """

    planes: Tensor
    sizes: Tensor
    first: int
    last: int


def planes_of(x: Tensor, bits: int, outliers: int, scales: Tensor, input_range: Tensor) -> list[PlanesPart]:
    """What `activations.quantize` replaces an input by, as planes: the 8-bit part, then the 4-bit part.

    Args:
        x: (M, K) float, columns in stored order.
        bits: 4 or 8.
        outliers: P; read with 4 bits only.
        scales: (5,), read with 4 bits only.
        input_range: (4,), or empty for per-token ranges.
    """
    q, lo, R = activations.codes(x, bits=bits, outliers=outliers, scales=scales, input_range=input_range)
    K = x.shape[1]
    split = K if bits == 8 else outliers
    parts = []
    if split:
        steps = R[:, 1:] / 255 * torch.exp2(torch.arange(8, device=x.device))
        parts.append(PlanesPart(_pack(q[:, :split], 8), torch.cat([steps, lo[:, 1:]], 1), 0, split))
    if split < K:
        zeta, rho = scales.float()[:1], scales.float()[1:]
        sizes = torch.cat([R[:, :1] * rho, lo[:, :1] + R[:, :1] * zeta], 1)
        parts.append(PlanesPart(_pack(q[:, split:], 4), sizes, split, K))
    return parts


def _pack(q: Tensor, planes: int) -> Tensor:
    """(M, columns) uint8 to the planes of its lowest bits and one of ones, packed."""
    numbers = torch.arange(planes, device=q.device, dtype=torch.uint8)
    bits = torch.cat([q[:, None] >> numbers[:, None] & 1, torch.ones_like(q)[:, None]], 1)
    bits = torch.nn.functional.pad(bits, (0, -q.shape[1] % 8))
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=q.device)
    return (bits.unflatten(-1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)


def usable(x: Tensor, group: int, activation_bits: int, outliers: int) -> bool:
    """Whether `matmul` can multiply this input: quantized, on a CUDA device, whole bytes a group, Triton there."""
    return (
        x.is_cuda
        and activation_bits in (4, 8)
        and group % 8 == 0
        and outliers % 8 == 0
        and find_spec("triton") is not None
    )


def matmul(
    x: Tensor,
    codes: Tensor,
    selector: Tensor,
    levels: Tensor,
    input_scales: Tensor,
    input_range: Tensor,
    bias: Tensor | None,
    in_features: int,
    group: int,
    activation_bits: int,
    outliers: int,
) -> Tensor:
    """`lit_binq.formats.two_plane_matmul` without outlier_bits: for x whose columns are in stored order.

    Args:
        x: (..., K) float on a CUDA device, see `usable`.
        codes: (N, ceil(K / 8)) uint8, as all others on x's device and as the operator has them.
        selector: (N, ceil(K / 8)) uint8.
        levels: (N, ceil(K / g), L) float16.
        input_scales: (5,) float16, or (0,) with 8 bits.
        input_range: (4,) float32, or (0,).
        bias: (N,) float or None.
        in_features: K.
        group: g.
        activation_bits: 4 or 8.
        outliers: P.

    Returns:
        (..., N), dtype of x. There is no gradient.
    """
    from lit_binq.formats.two_plane.triton import add_part

    rows = x.reshape(-1, in_features)
    y = rows.new_zeros(rows.shape[0], codes.shape[0], dtype=torch.float32)
    for part in planes_of(rows, activation_bits, outliers, input_scales, input_range):
        add_part(part.planes, part.sizes, codes, selector, levels, y, part.first, part.last, group, in_features)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])
