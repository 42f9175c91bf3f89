"""Signs to bits and back: the byte layout every file and every kernel of the project shares.

Legend: N output rows, K input columns, B (N, K) signs in {-1, +1}.

Row i of the packed array holds the signs of B[i]. Column k sits in byte k // 8 at bit k % 8, least significant
bit first; a set bit is +1, a clear bit is -1. Rows are padded to whole bytes with clear bits. Example, K = 10:

    B[i] = + - + + - - - +   - +          bits (LSB first) 1011 0001  01
    bytes:  0b1000_1101 = 141,  0b0000_0010 = 2
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from lit_binq.errors import LitBinqError


def packed_width(in_features: int) -> int:
    """Bytes a packed row takes: ceil(K / 8)."""
    return (in_features + 7) // 8


def pack_signs(B: Tensor) -> Tensor:
    """Pack signs into bytes.

    Args:
        B: (N, K), any real dtype; values >= 0 count as +1, negative values as -1.

    Returns:
        (N, ceil(K / 8)) uint8, padding bits clear.

    Raises:
        LitBinqError: B is not a matrix.
    """
    if B.dim() != 2:
        raise LitBinqError(f"pack_signs: got a tensor of shape {tuple(B.shape)}, expected a matrix (N, K)")
    bits = (B >= 0).to(torch.uint8)
    pad = -B.shape[1] % 8
    if pad:
        bits = torch.nn.functional.pad(bits, (0, pad))
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=B.device)
    return (bits.reshape(B.shape[0], -1, 8) * place).sum(-1, dtype=torch.uint8)


@lru_cache(maxsize=16)
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): row b holds the eight signs of byte b, least significant bit first."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (bits * 2 - 1).to(device=device, dtype=dtype)


def unpack_signs(codes: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack bytes into signs: the inverse of `pack_signs`.

    Args:
        codes: (N, ceil(K / 8)) uint8.
        in_features: K.
        dtype: dtype of the result.

    Returns:
        (N, K) with values -1 and +1.

    Raises:
        LitBinqError: the array is not uint8 or its width does not fit K.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != packed_width(in_features):
        raise LitBinqError(
            f"unpack_signs: got {codes.dtype} of shape {tuple(codes.shape)}, "
            f"expected uint8 (N, {packed_width(in_features)}) for {in_features} columns"
        )
    table = _byte_table(dtype, codes.device)
    return torch.nn.functional.embedding(codes.int(), table).flatten(1)[:, :in_features]


KEPT_BYTES = 1 << 30
"""Most that `weights_kept` keeps."""

_kept: dict[tuple[int, str], tuple[Tensor, Tensor]] | None = None


@contextmanager
def weights_kept() -> Iterator[None]:
    """Inside, layers unpack a weight once and not at every pass, as far as `KEPT_BYTES` go.

    For many passes over a few tokens each of a model that does not change, as a check of an export makes.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def kept(codes: Tensor, what: str, unpack: Callable[[], Tensor]) -> Tensor:
    """What `unpack` gives, from the last time if `weights_kept` has it.

    Args:
        codes: stored codes that it is made from; they name it.
        what: what is made of them.
        unpack: makes it.
    """
    if _kept is None:
        return unpack()
    key = (codes.data_ptr(), what)
    if key not in _kept:
        weight = unpack()
        if sum(t.nbytes for _, t in _kept.values()) + weight.nbytes > KEPT_BYTES:
            return weight
        _kept[key] = codes, weight  # with the codes: their address names nothing else while they are there
    return _kept[key][1]
