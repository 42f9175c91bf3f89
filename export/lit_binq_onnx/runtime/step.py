"""One more token for each row of a static cache: everything is bound once, then only numbers in place are changed.

A pass through `OnnxModel.forward` makes and binds its inputs and its logits anew. While decoding they have the same
places and shapes in every pass but one, the mask, which grows by a token. It need not: rows of the fused graph's mask
are ones, then zeros, and its width only says how much room the attention must have. Here it is as wide as the cache.

Knows ONNX Runtime's bindings and `cache.StaticCache`.

Legend: b batch, c capacity, V vocabulary.
"""

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from lit_binq_onnx.runtime.cache import StaticCache


class TokenStep:
    """The fused graph bound to the buffers of one cache.

    Args:
        session: of the fused graph.
        cache: whose buffers stay where they are while this object is used.
        past: names of the cache's inputs.
        present: names of its outputs.
        vocabulary: V.
        start: name of the optional input that says from which new token on logits are wanted; there is only one.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: "StaticCache",
        past: list[str],
        present: list[str],
        vocabulary: int,
        start: str,
    ) -> None:
        self._session = session
        self._binding = cache.bind(session, past, present)
        self._ids = np.zeros((cache.batch, 1), np.int64)
        self._mask = np.zeros((cache.batch, cache.capacity), np.int64)
        self._logits = np.empty((cache.batch, 1, vocabulary), np.float32)
        # On the CPU a value made from an array is that array's memory; it does not keep the array alive.
        self._start = np.zeros(1, np.int64)
        inputs = {"input_ids": self._ids, "attention_mask": self._mask, start: self._start}
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._values["logits"] = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._binding.bind_ortvalue_output("logits", self._values["logits"])
        self._rows = np.arange(cache.batch)
        self._masked = b""

    def run(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Append a token to each row.

        Args:
            tokens: (b,) integers.
            lengths: (b,) int64, tokens of each row so far, each below c.

        Returns:
            (b, V) float32, overwritten by the next call.
        """
        if lengths.tobytes() != self._masked:  # the first call, or rows were cut or written by another pass
            np.less(np.arange(self._mask.shape[1]), lengths[:, None], out=self._mask, casting="unsafe")
        self._mask[self._rows, lengths] = 1
        self._ids[:, 0] = tokens
        self._masked = b""  # a pass that fails leaves the mask a token too long
        self._session.run_with_iobinding(self._binding)
        self._masked = (lengths + 1).tobytes()
        return self._logits[:, 0]
