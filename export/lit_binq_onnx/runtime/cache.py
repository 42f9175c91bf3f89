"""Keys and values in buffers of a fixed size, which attention writes into where they lie.

Knows ONNX Runtime's values and bindings; nothing of files or models.

Legend: b batch, c capacity in tokens.
"""

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from lit_binq_onnx.runtime.errors import RunError

if TYPE_CHECKING:
    from lit_binq_onnx.runtime.step import TokenStep

FIRST_CAPACITY = 256
"""Room of a cache that was not told how long its text will be; doubled when it is full."""


class StaticCache:
    """The cache of the fused graph: the same memory is its past and its present.

    Args:
        shapes: (heads, head_dim) of every tensor: key 0, value 0, key 1, ...
        batch: b.
        capacity: tokens it has room for; more are made room for when needed, at the cost of a copy.
        limit: most tokens the model has positions for.

    Attributes:
        lengths: tokens of each row so far, (b,) int64.
        step: what decodes one token at a time, once `OnnxModel.step` has made it; gone when the buffers move.
    """

    step: "TokenStep | None"

    def __init__(self, shapes: list[tuple[int, int]], batch: int, capacity: int, limit: int | None = None) -> None:
        self._limit = limit
        self.lengths = np.zeros(batch, np.int64)
        self._set([np.zeros((batch, heads, capacity, size), np.float32) for heads, size in shapes])

    def _set(self, buffers: list[np.ndarray]) -> None:
        self._buffers = buffers
        # On the CPU a value made from an array is that array's memory.
        self._values = [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in buffers]
        self._binding: ort.IOBinding | None = None
        self.step = None

    @property
    def batch(self) -> int:
        """b."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max(initial=0))

    @property
    def capacity(self) -> int:
        """c."""
        return int(self._buffers[0].shape[2])

    def reserve(self, tokens: int) -> None:
        """Make room for rows of this length.

        Raises:
            RunError: the model has fewer positions.
        """
        if self._limit is not None and tokens > self._limit:
            raise RunError(f"cache: got {tokens} tokens, expected at most the model's {self._limit} positions")
        if tokens <= self.capacity:
            return
        room = max(tokens, 2 * self.capacity)
        room = room if self._limit is None else min(room, self._limit)
        grown = [np.zeros((*b.shape[:2], room, b.shape[3]), np.float32) for b in self._buffers]
        for new, old in zip(grown, self._buffers, strict=True):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._set(grown)

    def fill(self, arrays: list[np.ndarray]) -> None:
        """Begin with these keys and values, (b, heads, tokens, head_dim) each, in the order of `shapes`."""
        tokens = arrays[0].shape[2]
        self.reserve(tokens)
        for buffer, array in zip(self._buffers, arrays, strict=True):
            buffer[:, :, :tokens] = array
        self.lengths = np.full(self.batch, tokens, np.int64)

    def row(self, i: int) -> "StaticCache":
        """One row as a cache of batch 1 in the same memory; its length is its own from here on."""
        view = object.__new__(StaticCache)
        view._limit, view.lengths = self.capacity, self.lengths[i : i + 1].copy()
        view._set([buffer[i : i + 1] for buffer in self._buffers])
        return view

    def keep(self, rows: list[int]) -> "StaticCache":
        """A cache of some rows only, copied: the others are done."""
        kept = object.__new__(StaticCache)
        kept._limit, kept.lengths = self._limit, self.lengths[rows]
        kept._set([np.ascontiguousarray(buffer[rows]) for buffer in self._buffers])
        return kept

    def arrays(self) -> list[np.ndarray]:
        """Keys and values so far, (b, heads, length, head_dim) each, in the order of `shapes`; views."""
        return [buffer[:, :, : self.length] for buffer in self._buffers]

    def binding(self, session: ort.InferenceSession, past: list[str], present: list[str]) -> ort.IOBinding:
        """The buffers bound as both past and present; made once for each set of buffers.

        Args:
            session: always the same one for a cache.
            past: names of the inputs.
            present: names of the outputs.
        """
        if self._binding is None:
            self._binding = self.bind(session, past, present)
        return self._binding

    def bind(self, session: ort.InferenceSession, past: list[str], present: list[str]) -> ort.IOBinding:
        """As `binding`, but a new one each time."""
        made = session.io_binding()
        for value, before, after in zip(self._values, past, present, strict=True):
            made.bind_ortvalue_input(before, value)
            made.bind_ortvalue_output(after, value)
        return made


def row_lengths(
    input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray, past: StaticCache
) -> np.ndarray | None:
    """Tokens of each row after a pass, (b,) int64, or None where the fused graph cannot express the pass.

    It can where every row is tokens without padding before or between them, and its new tokens follow those in the
    cache. A first pass may have padding after the tokens; later rows of different lengths go on by one token each.
    """
    b, s = input_ids.shape
    mask = np.asarray(attention_mask) != 0
    lengths = mask.sum(1).astype(np.int64)
    if b != past.batch or (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any() or (lengths < 1).any():
        return None
    first = past.lengths
    new = np.minimum(lengths - first, s) if not past.length else lengths - first
    if (past.length and (new != s).any()) or (not past.length and mask.shape[1] != s):
        return None
    if past.length and s > 1 and b > 1 and len(set(lengths.tolist())) > 1:
        return None
    wanted = first[:, None] + np.arange(s)
    real = np.arange(s) < new[:, None]
    return None if (np.asarray(position_ids) != wanted)[real].any() else lengths
