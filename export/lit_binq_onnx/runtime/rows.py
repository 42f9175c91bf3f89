"""Several texts decoded side by side, on either route: prompts in, then one token a row and step.

Where a model's rotary angles depend on the length of the text (`angles` in its facts), a pass gives all its new tokens
the angles of its longest row. There every text has passes of its own, a prompt beyond the limit is read in one, and a
LongRoPE text that grows beyond it is read again, as transformers' Phi-3 does: its keys were made for short texts. So
a text's logits are those of a single pass over it.

Knows a session and its caches; nothing of text or sampling.

Legend: n rows, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from lit_binq_onnx.runtime.cache import StaticCache
from lit_binq_onnx.runtime.session import GrowingCache, OnnxModel, cache_arrays, positions

PREFILL = 256
"""Prompt tokens in one pass: bounds the logits of the generic route's prefill to PREFILL x V x 4 bytes a row."""


class Rows(ABC):
    """Texts in progress.

    Attributes:
        logits: (n, V) float32 after the last token of each row; `step` may overwrite them.
    """

    logits: np.ndarray

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> None:
        """Append one token to each row; `logits` are then those after it."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Go on with some rows only, in this order."""


class FusedRows(Rows):
    """Rows in a static cache: each prompt is read alone, without padding, into its own row.

    Args:
        onnx_model: on the fused route.
        prompts: token numbers of each row, none empty.
        new_tokens: most tokens that will be appended: the cache then never moves.
        part: prompt tokens in one pass.
    """

    def __init__(
        self, onnx_model: OnnxModel, prompts: Sequence[Sequence[int]], new_tokens: int, part: int = PREFILL
    ) -> None:
        self._model = onnx_model
        longest = max(map(len, prompts))
        cache = onnx_model.empty_past(len(prompts), longest + new_tokens)
        assert isinstance(cache, StaticCache)
        self._cache, found = cache, []
        for i, prompt in enumerate(prompts):
            row = cache.row(i)
            for start in range(0, len(prompt), part):
                ids = np.array([prompt[start : start + part]])
                stop = start + ids.shape[1]
                mask, where = np.ones((1, stop)), np.arange(start, stop)[None]
                logits, _ = onnx_model.forward(ids, mask, where, row, last_only=True)
            found.append(logits[0, -1])
        cache.lengths = np.array([len(prompt) for prompt in prompts])
        self.logits = np.stack(found)

    def step(self, tokens: Sequence[int]) -> None:
        """See `Rows`."""
        self.logits = self._model.step(np.array(tokens), self._cache)

    def keep(self, rows: list[int]) -> None:
        """See `Rows`."""
        self._cache, self.logits = self._cache.keep(rows), self.logits[rows]


class GenericRows(Rows):
    """Rows padded on the left to one length; the cache is what the last pass gave out.

    Args:
        onnx_model: on the generic route.
        prompts: token numbers of each row, none empty.
        part: positions in one pass.
    """

    def __init__(self, onnx_model: OnnxModel, prompts: Sequence[Sequence[int]], part: int = PREFILL) -> None:
        self._model = onnx_model
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        pad = np.array([longest - len(prompt) for prompt in prompts])
        self._mask = (np.arange(longest) >= pad[:, None]).astype(np.int64)
        where = positions(self._mask)
        past = onnx_model.empty_past(len(prompts))
        for start in range(0, longest, part):
            now = slice(start, start + part)
            mask = self._mask[:, : min(start + part, longest)]
            logits, past = onnx_model.forward(ids[:, now], mask, where[:, now], past, last_only=True)
        assert not isinstance(past, StaticCache)
        self._past: GrowingCache = past
        self.logits = logits[:, -1]

    def step(self, tokens: Sequence[int]) -> None:
        """See `Rows`."""
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        where = self._mask.sum(1, keepdims=True) - 1
        logits, past = self._model.forward(np.array(tokens)[:, None], self._mask, where, self._past)
        assert not isinstance(past, StaticCache)
        self._past, self.logits = past, logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """See `Rows`."""
        kept = [np.ascontiguousarray(array[rows]) for array in cache_arrays(self._past)]
        self._past = [ort.OrtValue.ortvalue_from_numpy(array) for array in kept]
        self._mask, self.logits = self._mask[rows], self.logits[rows]


class LengthRow(GenericRows):
    """One text of a model whose angles depend on its length.

    Args:
        onnx_model: on the generic route.
        prompt: token numbers, not empty.
        kind: "longrope" or "dynamic".
        limit: longest text that has the first angles.
        part: positions in one pass, of a prompt that is not longer than the limit.
    """

    def __init__(self, onnx_model: OnnxModel, prompt: Sequence[int], kind: str, limit: int, part: int) -> None:
        self._ids, self._switch = list(prompt), limit + 1 if kind == "longrope" else None
        super().__init__(onnx_model, [prompt], part if len(prompt) <= limit else len(prompt))

    def step(self, tokens: Sequence[int]) -> None:
        """See `Rows`."""
        self._ids += map(int, tokens)
        if len(self._ids) == self._switch:
            super().__init__(self._model, [self._ids], len(self._ids))
        else:
            super().step(tokens)


class SeparateRows(Rows):
    """Texts that share no pass.

    Args:
        rows: of one text each.
    """

    def __init__(self, rows: Sequence[Rows]) -> None:
        self._rows = list(rows)
        self.logits = np.concatenate([row.logits for row in self._rows])

    def step(self, tokens: Sequence[int]) -> None:
        """See `Rows`."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.step([token])
        self.logits = np.concatenate([row.logits for row in self._rows])

    def keep(self, rows: list[int]) -> None:
        """See `Rows`."""
        self._rows, self.logits = [self._rows[i] for i in rows], self.logits[rows]


def start_rows(
    onnx_model: OnnxModel, prompts: Sequence[Sequence[int]], new_tokens: int, *, part: int = PREFILL
) -> Rows:
    """Read the prompts on the model's route; arguments as the classes'."""
    if onnx_model.route == "fused":
        return FusedRows(onnx_model, prompts, new_tokens, part)
    angles = onnx_model.facts.get("angles")
    if angles is not None:
        kind, limit = str(angles["kind"]), int(angles["limit"])
        return SeparateRows([LengthRow(onnx_model, prompt, kind, limit, part) for prompt in prompts])
    return GenericRows(onnx_model, prompts, part)
