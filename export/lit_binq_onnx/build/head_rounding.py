"""Rounding a table to 8 or 4 bits, block by block of g neighbours in a row.

    8 bits   symmetric: w^ = s (q - 128), s = max |w| / 127, to the nearest
    4 bits   asymmetric: w^ = s (q - z). The range of a block is shrunk by some factors, each grid's scale then fitted
             to the codes it gives (least squares), and the grid that errs least is taken. With the Gram matrix H of
             what the table will be multiplied with, errors count by H and are fed back.

Scales have the 11 significant bits of float16, stored as float32: NBitsMatMul then keeps them in 2 bytes, which saves a
tenth of what a head of 4 bits reads. (It divides those of 16 rows by a power of two: their size does not matter.) They
are rounded before codes are chosen, so that codes make good for it.

With H the rounding is GPTQ's (arXiv 2210.17323): columns one by one, those to come make good what a column does wrong
(lit_binq.statistics.error_feedback), so that tr((W^ - W) H (W^ - W)^T) is small instead of the plain error. A block's
grid comes from its columns as they are by then, squared errors weighted with 1 / U_jj^2, what an error in column j
costs after all that later columns can do. Deviations: columns keep their order, and the search for grids is ours.

Why, for SmolLM2-135M with three planes a linear (perplexity 60.60 with the plain head; blocks of 32): 4 bits to the
nearest, 66.23 and 0.098 nats of KL divergence from the plain head's predictions; with H of random tokens, 60.89 and
0.027; with H of 8192 tokens of text, 60.82 and 0.016. Blocks of 16 and 64, with text: 60.88 and 0.011, 62.06 and 0.023.

Legend: V vocabulary, K width, g block, G = K / g, W (V, K) table, H (K, K) Gram matrix of the head's inputs with
H^-1 = U^T U, s scales, z zero points, q codes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.statistics.error_feedback import columns_and_errors, inverse_factor

HEAD_BITS = (0, 4, 8)
BLOCKS = (32, 16)
"""Block lengths in the order of choice: a block must divide the width, since the embedding has no padded columns."""

HEAD_BLOCKS = (16, 32, 64, 128)
"""Block lengths that may be asked for."""

SHRINK = (1.0, 0.9, 0.8, 0.7)
"""Factors tried on the range of a 4-bit block."""

DAMPING = 0.05
"""Share of H's mean diagonal added to it: some thousand tokens say little of its small eigenvalues."""

RANDOM_DAMPING = 0.1
"""The same for random tokens, whose H is not a text's."""

TEXT_WINDOWS = 32
"""Windows of a text of which H is made."""

WINDOW = 256
"""Tokens of a window of which H is made."""

_ROWS = 4096  # rows rounded at a time: bounds the float32 copies to a few times 4096 K


@dataclass(frozen=True)
class QuantizedTable:
    """A rounded table.

    Attributes:
        bits: 4 or 8.
        block: g.
        codes: (V, K bits / 8) uint8; of two 4-bit codes the first is in the low half.
        scales: (V, G) float32.
        zeros: (V, ceil(G / 2)) uint8, two to a byte; None means 2^(bits - 1) everywhere.
    """

    bits: int
    block: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @property
    def width(self) -> int:
        """K."""
        return self.codes.shape[1] * 8 // self.bits

    def blocked(self) -> np.ndarray:
        """The codes as MatMulNBits wants them, (V, G, g bits / 8) uint8."""
        return self.codes.reshape(len(self.codes), -1, self.block * self.bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def stored_bits(self) -> float:
        """Bits of everything stored, for each weight."""
        return 8 * self.nbytes / (len(self.codes) * self.width)

    def dense(self) -> np.ndarray:
        """The table it stands for, (V, K) float32."""
        rows, groups = self.scales.shape
        q = _unpack(self.codes) if self.bits == 4 else self.codes
        z = np.full((rows, groups), 128, np.uint8) if self.zeros is None else _unpack(self.zeros)[:, :groups]
        out = np.empty((rows, self.width), np.float32)
        for i in range(0, rows, _ROWS):
            part = slice(i, i + _ROWS)
            levels = q[part].reshape(-1, groups, self.block).astype(np.float32) - z[part, :, None]
            out[part] = (levels * self.scales[part, :, None]).reshape(len(levels), -1)
        return out


def _pack(values: np.ndarray) -> np.ndarray:
    """4-bit values (V, n) in bytes (V, ceil(n / 2)), the first of two in the low half."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed: np.ndarray = values[:, 0::2] | (values[:, 1::2] << 4)
    return packed


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Bytes (V, n) as 4-bit values (V, 2 n)."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _short(scales: Tensor, *, down: bool = False) -> Tensor:
    """Scales, float32 from 0, with 11 significant bits: the nearest such, or the next one down."""
    bits = scales.contiguous().view(torch.int32)
    return ((bits if down else bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _round_symmetric(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 bits. blocks (m, G, g) float32 -> codes (m, G, g) uint8, scales (m, G) float32."""
    # Down: a step is then no longer than it was, and the largest weight, 127.12 of them at most, still has code 127.
    scales = _short(torch.from_numpy(np.abs(blocks).max(2) / np.float32(127)), down=True).numpy()
    scales[scales == 0] = 1
    codes = np.rint(blocks / scales[:, :, None]) + 128
    return codes.astype(np.uint8), scales.astype(np.float32)


def _grid(W: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The 4-bit grid of each row of a block: s and z (m,) float32.

    Args:
        W: (m, g).
        h: (g,), weights of the squared errors.
    """
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)  # zero stays a level
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINK:
        s = _short((high - low) * (shrink / 15))
        s = torch.where(s > 0, s, 1.0)
        z = (-low * shrink / s).round().clamp(0, 15)
        levels = _levels(W, s, z)
        product, square = (levels * W * h).sum(1), (levels.square() * h).sum(1)
        fitted = torch.where(product > 0, _short(product / square), s)  # a zero square has a zero product
        for scale in (s, fitted):
            error = ((_levels(W, scale, z) * scale[:, None] - W).square() * h).sum(1)
            better = error < best
            best, scales, zeros = (
                torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (z, zeros))
            )
    return scales, zeros


def _levels(W: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """q - z of weights (m, n) on the grids of their rows."""
    return (W / s[:, None] + z[:, None]).round().clamp(0, 15) - z[:, None]


def _round_asymmetric(W: Tensor, block: int, U: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits, with errors fed back where U is given.

    Args:
        W: (m, K) float32.
        block: g.
        U: (K, K), see `lit_binq.statistics.error_feedback.inverse_factor`.

    Returns:
        codes (m, K) uint8, scales (m, G) float32, zeros (m, G) uint8.
    """
    every_s, every_z, codes = [], [], []
    for begin in range(0, W.shape[1], block):
        end = begin + block
        part = W[:, begin:end]
        s, z = _grid(part, torch.ones(block) if U is None else U.diagonal()[begin:end] ** -2)
        if U is None:
            levels = _levels(part, s, z)
        else:

            def nearest(w: Tensor, _: int, s: Tensor = s, z: Tensor = z) -> Tensor:
                return s * _levels(w[:, None], s, z)[:, 0]

            rounded, errors = columns_and_errors(part, U[begin:end, begin:end], nearest)
            levels = (rounded / s[:, None]).round()
            W = torch.cat((W[:, :end], W[:, end:] - errors.T @ U[begin:end, end:]), 1)
        every_s.append(s)
        every_z.append(z)
        codes.append((levels + z[:, None]).to(torch.uint8))
    return torch.cat(codes, 1), torch.stack(every_s, 1), torch.stack(every_z, 1).to(torch.uint8)


def quantize_table(
    table: np.ndarray, bits: int, *, block: int | None = None, gram: Tensor | None = None
) -> QuantizedTable:
    """Round a table.

    Args:
        table: (V, K) float32.
        bits: 4 or 8.
        block: g, one of `HEAD_BLOCKS` that divides K; None takes the first of `BLOCKS` that does.
        gram: H (K, K), of what the table is multiplied with; used at 4 bits only. None: plain squared error.

    Raises:
        LitBinqError: another number of bits, a block that is not allowed or does not divide the width, a Gram matrix
            that cannot be inverted, or values that are not finite.
    """
    if bits not in HEAD_BITS[1:]:
        raise LitBinqError(f"head_bits: got {bits}, expected one of {', '.join(map(str, HEAD_BITS))}")
    rows, width = table.shape
    if block is not None and (block not in HEAD_BLOCKS or width % block):
        fitting = ", ".join(str(g) for g in HEAD_BLOCKS if width % g == 0) or "none: use `--head_bits 0`"
        raise LitBinqError(f"head_block: got {block}, expected one that divides the width {width}: {fitting}")
    block = block or next((g for g in BLOCKS if width % g == 0), None)
    if block is None:
        raise LitBinqError(f"head_bits: the embedding is {width} wide, expected a multiple of 16: use `--head_bits 0`")
    if not np.isfinite(table).all():
        raise LitBinqError("head_bits: the embedding holds values that are not finite, expected finite ones")
    codes = np.empty((rows, width), np.uint8)
    scales = np.empty((rows, width // block), np.float32)
    zeros = None if bits == 8 else np.empty((rows, width // block), np.uint8)
    U = None if gram is None or bits == 8 else inverse_factor(gram)
    for i in range(0, rows, _ROWS):
        part = slice(i, i + _ROWS)
        if zeros is None:
            blocks, scales[part] = _round_symmetric(table[part].reshape(-1, width // block, block))
            codes[part] = blocks.reshape(-1, width)
        else:
            found = _round_asymmetric(torch.tensor(table[part]), block, U)
            codes[part], scales[part], zeros[part] = (tensor.numpy() for tensor in found)
    if zeros is None:
        return QuantizedTable(bits, block, codes, scales, None)
    return QuantizedTable(bits, block, _pack(codes), scales, _pack(zeros))


def random_windows(model: PreTrainedModel, count: int = 16, *, seed: int = 0) -> Tensor:
    """Windows (count, `WINDOW` or as many positions as there are) of random tokens that the model has, int64."""
    config = model.config.get_text_config(decoder=True)
    length = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    return torch.randint(config.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


class _Seen(Exception):
    """The head's input is known: the product itself is not needed."""


@torch.no_grad()
def head_gram(model: PreTrainedModel, windows: Tensor, *, damping: float = DAMPING) -> Tensor:
    """H = x^T x / n of all inputs x of a model's head, damped, (K, K) float32.

    Args:
        model: with an nn.Linear head; in evaluation mode, on the CPU.
        windows: (n, T) int64.
        damping: share of the mean of H's diagonal that is added to it.

    Raises:
        LitBinqError: the model has no nn.Linear head, or its values are not finite.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise LitBinqError(
            f"head_bits: {type(model).__name__} has head {type(head).__name__}, expected nn.Linear: use `--head_bits 0`"
        )
    total = torch.zeros(head.in_features, head.in_features, dtype=torch.float64)

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        total.add_(x.T @ x)
        raise _Seen

    handle = head.register_forward_pre_hook(take)
    try:
        for window in windows.split(4):
            try:
                model(input_ids=window, use_cache=False)
            except _Seen:
                continue
    finally:
        handle.remove()
    if not bool(torch.isfinite(total).all()):
        raise LitBinqError("head_bits: the inputs of the head are not finite (NaN or inf): the packed model is damaged")
    H = total / windows.numel()
    return (H + damping * H.diagonal().mean() * torch.eye(len(H))).float()
