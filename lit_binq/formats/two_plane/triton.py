"""The Triton kernel of two-plane products: AND and popcount of packed bits. Imported only where Triton is there.

Legend: as in lit_binq.formats.two_plane.device. A unit is what one load takes of a row: a byte or, where all limits
allow it, a word of 32 columns. Of one group and plane of the input the kernel counts, in whole numbers,

    c_q = count(q_k)   c_A = count(A & q_k)   c_B = count(B & q_k)   c_AB = count(A & B & q_k), for L = 4 only

and of one group, with T = sum_k a_k c_q and S_A = sum_k a_k (2 c_A - c_q), likewise B and AB:

    L = 2    a1 S_A + a2 S_B             L = 3    m T + a1 S_A + a2 S_B
    L = 4    l0 T + (l1 - l0) U_A + (l2 - l0) U_B + (l3 - l1 - l2 + l0) U_AB,   U = (S + T) / 2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 64
"""Of the tile of y that a program computes."""


@triton.jit
def _popcount(v):  # type: ignore[no-untyped-def]  # Triton reads annotations itself
    """Bits set in each uint32."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v = v + (v >> 8)
    return ((v + (v >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _add_part(  # type: ignore[no-untyped-def]  # as above
    q_ptr,
    size_ptr,
    a_ptr,
    b_ptr,
    level_ptr,
    y_ptr,
    count_ptr,
    M,
    N,
    q_units,
    w_units,
    first,
    last,
    group,
    groups,
    L: tl.constexpr,
    PLANES: tl.constexpr,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y += the product of the units from `first` to `last`; `group` is in units, `groups` how many a row has."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    here = in_m[:, None] & in_n[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(first // group, (last + group - 1) // group):
        low, high = tl.maximum(g * group, first), tl.minimum(g * group + group, last)
        T = tl.zeros((BM,), tl.float32)
        U_a = tl.zeros((BM, BN), tl.float32)
        U_b = tl.zeros((BM, BN), tl.float32)
        U_ab = tl.zeros((BM, BN), tl.float32)
        for k in tl.static_range(PLANES):
            c_q = tl.zeros((BM,), tl.int32)
            c_a = tl.zeros((BM, BN), tl.int32)
            c_b = tl.zeros((BM, BN), tl.int32)
            c_ab = tl.zeros((BM, BN), tl.int32)
            for j in range(low, high):
                q = tl.load(q_ptr + (m * PLANES + k) * q_units + (j - first), mask=in_m, other=0).to(tl.uint32)
                a = tl.load(a_ptr + n * w_units + j, mask=in_n, other=0).to(tl.uint32)
                b = tl.load(b_ptr + n * w_units + j, mask=in_n, other=0).to(tl.uint32)
                c_q += _popcount(q)
                c_a += _popcount(q[:, None] & a[None, :])
                c_b += _popcount(q[:, None] & b[None, :])
                if L == 4:
                    c_ab += _popcount(q[:, None] & (a & b)[None, :])
            size = tl.load(size_ptr + m * PLANES + k, mask=in_m, other=0.0)
            T += size * c_q.to(tl.float32)
            U_a += size[:, None] * c_a.to(tl.float32)
            U_b += size[:, None] * c_b.to(tl.float32)
            if L == 4:
                U_ab += size[:, None] * c_ab.to(tl.float32)
            if COUNT:
                at = count_ptr + ((g * PLANES + k) * 3 * M + m[:, None]) * N + n[None, :]
                tl.store(at, c_a, mask=here)
                tl.store(at + M * N, c_b, mask=here)
                tl.store(at + 2 * M * N, c_ab, mask=here)
        level = level_ptr + (n * groups + g) * L
        l0 = tl.load(level, mask=in_n, other=0.0).to(tl.float32)[None, :]
        l1 = tl.load(level + 1, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if L == 2:
            total += l0 * (2.0 * U_a - T[:, None]) + l1 * (2.0 * U_b - T[:, None])
        else:
            l2 = tl.load(level + 2, mask=in_n, other=0.0).to(tl.float32)[None, :]
            if L == 3:
                total += l0 * T[:, None] + l1 * (2.0 * U_a - T[:, None]) + l2 * (2.0 * U_b - T[:, None])
            else:
                l3 = tl.load(level + 3, mask=in_n, other=0.0).to(tl.float32)[None, :]
                total += l0 * T[:, None] + (l1 - l0) * U_a + (l2 - l0) * U_b + (l3 - l1 - l2 + l0) * U_ab
    at = y_ptr + m[:, None] * N + n[None, :]
    tl.store(at, tl.load(at, mask=here, other=0.0) + total, mask=here)


def add_part(
    planes: Tensor,
    sizes: Tensor,
    codes: Tensor,
    selector: Tensor,
    levels: Tensor,
    y: Tensor,
    first: int,
    last: int,
    group: int,
    in_features: int,
    counts: Tensor | None = None,
) -> None:
    """Add the product of one part of the columns to y, in place.

    Args:
        planes: (M, k, ceil(columns / 8)) uint8, see `two_plane_device.PlanesPart`.
        sizes: (M, k) float32.
        codes: (N, ceil(K / 8)) uint8.
        selector: (N, ceil(K / 8)) uint8.
        levels: (N, ceil(K / g), L) float16.
        y: (M, N) float32, contiguous.
        first: the first column, a multiple of 8.
        last: the one after the last; a multiple of 8, or K.
        group: g, a multiple of 8.
        in_features: K.
        counts: (ceil(K / g), k, 3, M, N) int32 or None; takes the counts of A, B and A & B (L = 4) with each plane.
    """
    M, N = y.shape
    if not M or not N:
        return
    words = all(columns % 32 == 0 for columns in (in_features, group, first, last))
    unit = 32 if words else 8

    def units(packed: Tensor) -> Tensor:
        return packed.contiguous().view(torch.int32) if words else packed.contiguous()

    q, A, B = units(planes), units(codes), units(selector)
    L, k = levels.shape[2], planes.shape[1]
    _add_part[triton.cdiv(M, ROWS), triton.cdiv(N, COLUMNS)](
        q,
        sizes.contiguous(),
        A,
        B,
        levels.contiguous(),
        y,
        y if counts is None else counts,
        M,
        N,
        q.shape[2],
        A.shape[1],
        first // unit,
        -(-last // unit),
        group // unit,
        levels.shape[1],
        L=L,
        PLANES=k,
        COUNT=counts is not None,
        BM=ROWS,
        BN=COLUMNS,
    )
