"""What the tests of CachedAttention share: random problems, a float64 reference, one-node models, sessions.

Legend: b rows, s new tokens, h query heads, k KV heads, d width of a head, c room of the cache, t = total_tokens,
n tokens of a row with its new ones, P positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from lit_binq_onnx.functions import add_functions
from native import KernelLibrary, session

INPUTS = ("query", "past_key", "past_value", "last_positions", "total_tokens", "cos", "sin", "key", "value")
OUTPUTS = ("heads", "present_key", "present_value")
POSITIONS = 640


@dataclass
class Problem:
    """One call. What lies in the cache beyond a row's tokens is NaN: nobody may read it."""

    h: int
    k: int
    d: int
    lengths: list[int]  # n of each row
    s: int
    room: int
    total: int
    window: int = -1
    seed: int = 0
    packed: bool = True
    inputs: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        b, width = len(self.lengths), (self.h + 2 * self.k) * self.d
        angles = np.arange(POSITIONS)[:, None] * 100.0 ** -(np.arange(self.d // 2) / (self.d // 2))
        cache = rng.standard_normal((2, b, self.k, self.room, self.d)).astype(np.float32)
        for i in range(b):
            cache[:, i, :, self.past(i) :] = np.nan
        self.inputs = {
            "query": rng.standard_normal((b, self.s, width)).astype(np.float32),
            "past_key": cache[0],
            "past_value": cache[1],
            "last_positions": np.array(self.lengths, np.int32) - np.int32(1),
            "total_tokens": np.array(self.total, np.int32),
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
        }
        if not self.packed:
            bounds = np.array([self.h, self.h + self.k]) * self.d
            parts = np.split(self.inputs["query"], bounds, axis=2)
            self.inputs |= dict(zip(("query", "key", "value"), map(np.ascontiguousarray, parts), strict=True))

    @property
    def scale(self) -> float:
        return float(self.d**-0.5)

    @property
    def first(self) -> bool:
        return self.total == self.s

    def past(self, row: int) -> int:
        return 0 if self.first else self.lengths[row] - self.s

    def new(self, row: int) -> int:
        """New tokens that are no padding."""
        return self.lengths[row] if self.first else self.s

    def parts(self) -> list[np.ndarray]:
        """q (b, s, h, d), k and v (b, s, k, d), float64."""
        joined = self.inputs["query"]
        if not self.packed:
            joined = np.concatenate([joined, self.inputs["key"], self.inputs["value"]], 2)
        b, s = joined.shape[:2]
        split = joined.astype(np.float64).reshape(b, s, self.h + 2 * self.k, self.d)
        return np.split(split, [self.h, self.h + self.k], axis=2)

    def rotated(self, x: np.ndarray, position: int) -> np.ndarray:
        """(heads, d) float64."""
        cos, sin = (self.inputs[name][position].astype(np.float64) for name in ("cos", "sin"))
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """heads (b, s, h * d), zeros for padding; keys and values (b, k, max(c, t), d), zeros beyond tokens."""
        q, k, v = self.parts()
        b = len(self.lengths)
        heads = np.zeros((b, self.s, self.h, self.d))
        cache = np.zeros((2, b, self.k, max(self.room, self.total), self.d))
        for i in range(b):
            past = self.past(i)
            cache[0, i, :, :past] = self.inputs["past_key"][i, :, :past]
            cache[1, i, :, :past] = self.inputs["past_value"][i, :, :past]
            for j in range(self.new(i)):
                cache[0, i, :, past + j] = self.rotated(k[i, j], past + j)
                cache[1, i, :, past + j] = v[i, j]
            for j in range(self.new(i)):
                end = past + j + 1
                start = 0 if self.window < 0 else max(0, end - self.window)
                keys, values = (np.repeat(c[i, :, start:end], self.h // self.k, 0) for c in cache)
                scores = np.einsum("hd,htd->ht", self.rotated(q[i, j], past + j), keys) * self.scale
                weights = np.exp(scores - scores.max(1, keepdims=True))
                heads[i, j] = np.einsum("ht,htd->hd", weights / weights.sum(1, keepdims=True), values)
        return heads.reshape(b, self.s, self.h * self.d), cache[0], cache[1]

    def model(self, *, body: bool = False, **attributes: Any) -> onnx.ModelProto:
        """The node, all its inputs and outputs the graph's."""
        names = [name for name in INPUTS if name in self.inputs]
        attributes = {
            "num_heads": self.h,
            "kv_num_heads": self.k,
            "scale": self.scale,
            "local_window_size": self.window,
        } | attributes
        attributes = {name: value for name, value in attributes.items() if value is not None}
        kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
        graph = helper.make_graph(
            [helper.make_node("CachedAttention", names, OUTPUTS, "attention", domain="lit_binq", **attributes)],
            "one_node",
            [
                helper.make_tensor_value_info(
                    n, kinds[self.inputs[n].dtype], [f"{n} {i}" for i in range(self.inputs[n].ndim)]
                )
                for n in names
            ],
            [
                helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank)
                for n, rank in zip(OUTPUTS, (3, 4, 4), strict=True)
            ],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        if body:
            add_functions(made)
        return made

    def run(self, library: KernelLibrary | None, *, isa: str | None = None, threads: int = 1) -> list[np.ndarray]:
        """heads, present_key, present_value, the last two in new memory; the function body without a library."""
        made = self.model(body=library is None)
        if library is not None and isa is not None:
            library = library.on(isa)
        outputs: list[np.ndarray] = session(made, library, threads=threads).run(None, self.inputs)
        return outputs

    def run_in_place(
        self, opened: ort.InferenceSession, copied: Callable[[np.ndarray], np.ndarray] = np.copy
    ) -> list[np.ndarray]:
        """The same where past and present are the same memory, which is copied first."""
        binding = opened.io_binding()
        arrays = {name: copied(array) for name, array in self.inputs.items()}
        arrays["heads"] = copied(np.full((len(self.lengths), self.s, self.h * self.d), 12345.0, np.float32))
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        for name in self.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in OUTPUTS:
            binding.bind_ortvalue_output(name, values[name.replace("present", "past")])
        opened.run_with_iobinding(binding)
        return [arrays["heads"], arrays["past_key"], arrays["past_value"]]

    def close(self, got: list[np.ndarray], *, in_place: bool = False, tolerance: float = 2e-6) -> None:
        """Against `reference`; in place, what no token of a row has written is still NaN."""
        expected = self.reference()
        assert [x.shape for x in got] == [x.shape for x in expected]
        for mine, right in zip(got, expected, strict=True):
            if in_place and mine.ndim == 4:
                mine = mine.copy()
                for i, n in enumerate(self.lengths):
                    assert np.isnan(mine[i, :, n:]).all()
                    mine[i, :, n:] = 0
            np.testing.assert_allclose(mine, right, atol=tolerance * max(1.0, np.abs(right).max(initial=0)), rtol=0)
