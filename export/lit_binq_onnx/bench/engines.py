"""The candidates of `litbinq bench decode` and `prefill`: one interface to the programs that write text.

Each engine is opened in a process of its own (`lit_binq_onnx.bench.worker`), imports nothing but its own program,
decodes greedily, and takes the likeliest token with numpy or by itself, whichever its user would.

Legend: n tokens of context, V vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Setting:
    """What a process must know.

    Attributes:
        engine: a key of `ENGINES`.
        source: folder or file of the model.
        threads: of arithmetic.
        capacity: most tokens that a text will have.
    """

    engine: str
    source: str
    threads: int
    capacity: int


class Engine(Protocol):
    """A model that is open, with one text at a time; after `prefill` it decodes and rewinds as often as wished."""

    def reset(self) -> None:
        """An empty cache, its memory allocated where that is the program's way."""

    def prefill(self, ids: list[int]) -> None:
        """Read a context of n tokens into the empty cache, and choose the token after it."""

    def rewind(self) -> None:
        """Back to the end of the context."""

    def decode(self, steps: int) -> list[int]:
        """Go on by so many tokens, each one pass; gives the tokens that were chosen."""


class OnnxEngine:
    """An exported folder in `lit_binq_onnx.runtime.session`."""

    def __init__(self, setting: Setting, native: bool) -> None:
        from lit_binq_onnx.runtime.session import OnnxModel

        self._model = OnnxModel(setting.source, native=native, threads=setting.threads)
        self._capacity = setting.capacity

    def reset(self) -> None:
        """An empty cache of the size that will be needed."""
        self._past = self._model.empty_past(1, self._capacity)
        self._n = 0

    def _pass(self, ids: list[int], at: int, past: Any) -> tuple[int, Any]:
        """The likeliest next token and the cache after these tokens, the first of them being number `at`."""
        total = at + len(ids)
        logits, past = self._model.forward(
            np.array([ids]), np.ones((1, total), np.int64), np.arange(at, total)[None], past, last_only=True
        )
        return int(logits[0, -1].argmax()), past

    def prefill(self, ids: list[int]) -> None:
        """One pass over the context."""
        self._next, self._past = self._pass(ids, 0, self._past)
        self._n = len(ids)

    def rewind(self) -> None:
        """A cache that writes in place forgets; one that grows was never changed."""
        from lit_binq_onnx.runtime.cache import StaticCache

        if isinstance(self._past, StaticCache):
            self._past.lengths = np.array([self._n], np.int64)

    def decode(self, steps: int) -> list[int]:
        """One pass each, as `lit_binq_onnx.runtime.generate` does it."""
        from lit_binq_onnx.runtime.cache import StaticCache

        token, past, chosen = self._next, self._past, []
        for i in range(steps):
            if isinstance(past, StaticCache):
                token = int(self._model.step(np.array([token]), past)[0].argmax())
            else:
                token, past = self._pass([token], self._n + i, past)
            chosen.append(token)
        return chosen


class TorchEngine:
    """The full-precision model in eager torch, float32, with its dynamic cache."""

    def __init__(self, setting: Setting) -> None:
        import torch

        from lit_binq.models.load import load_model

        torch.set_num_threads(setting.threads)
        self._torch = torch
        self._model = load_model(setting.source)

    def reset(self) -> None:
        """A new cache."""
        from transformers import DynamicCache

        self._past = DynamicCache()

    def _pass(self, ids: list[int]) -> int:
        with self._torch.inference_mode():
            # As `generate` does, only the last position's logits are computed.
            out = self._model(
                input_ids=self._torch.tensor([ids]), past_key_values=self._past, use_cache=True, logits_to_keep=1
            )
            return int(out.logits[0, -1].argmax())

    def prefill(self, ids: list[int]) -> None:
        """One pass over the context."""
        self._next, self._n = self._pass(ids), len(ids)

    def rewind(self) -> None:
        """Cut the cache."""
        surplus = self._past.get_seq_length() - self._n
        if surplus > 0:
            self._past.crop(-surplus)

    def decode(self, steps: int) -> list[int]:
        """One pass each."""
        token, chosen = self._next, []
        for _ in range(steps):
            token = self._pass([token])
            chosen.append(token)
        return chosen


class GenaiEngine:
    """A folder for onnxruntime-genai, for instance of its model builder at int4."""

    def __init__(self, setting: Setting) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(setting.source)
        options = {"session_options": {"intra_op_num_threads": setting.threads, "inter_op_num_threads": 1}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = onnxruntime_genai.Model(config)
        self._capacity = setting.capacity

    def reset(self) -> None:
        """A new generator."""
        parameters = self._genai.GeneratorParams(self._model)
        # min_length: an end of the text must not end the measurement
        parameters.set_search_options(do_sample=False, max_length=self._capacity, min_length=self._capacity)
        self._generator = self._genai.Generator(self._model, parameters)

    def prefill(self, ids: list[int]) -> None:
        """One call; the token is chosen as the first step of a text chooses it."""
        self._generator.append_tokens(np.array([ids], np.int32))
        logits = self._generator.get_logits()  # (1, 1 or n, V)
        self._next = int(logits.reshape(-1, logits.shape[-1])[-1].argmax())
        self._n = len(ids)

    def rewind(self) -> None:
        """As the program offers."""
        if self._generator.token_count() > self._n:
            self._generator.rewind_to(self._n)

    def decode(self, steps: int) -> list[int]:
        """The first token is given, as that of the context; then the program's own loop, a pass and a choice each."""
        self._generator.append_tokens(np.array([[self._next]], np.int32))
        chosen = []
        for _ in range(steps):
            self._generator.generate_next_token()
            chosen.append(int(self._generator.get_next_tokens()[0]))
        return chosen


class LlamaEngine:
    """A GGUF file in llama.cpp."""

    def __init__(self, setting: Setting) -> None:
        import llama_cpp

        self._llama_cpp = llama_cpp
        self._llama = llama_cpp.Llama(
            setting.source,
            n_ctx=setting.capacity,
            n_batch=min(setting.capacity, 2048),
            n_threads=setting.threads,
            n_threads_batch=setting.threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def reset(self) -> None:
        """Forget the text; the cache was allocated at the start."""
        self._llama.reset()

    def _likeliest(self) -> int:
        pointer = self._llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(pointer, (self._llama.n_vocab(),)).argmax())

    def prefill(self, ids: list[int]) -> None:
        """One batch over the context, of 2048 tokens at most."""
        self._llama.eval(ids)
        self._next, self._n = self._likeliest(), len(ids)

    def rewind(self) -> None:
        """The next `eval` takes the cache back to this length."""
        self._llama.n_tokens = self._n

    def decode(self, steps: int) -> list[int]:
        """One pass each."""
        token, chosen = self._next, []
        for _ in range(steps):
            self._llama.eval([token])
            token = self._likeliest()
            chosen.append(token)
        return chosen


ENGINES: dict[str, Callable[[Setting], Engine]] = {
    "native": lambda setting: OnnxEngine(setting, native=True),
    "unmodified": lambda setting: OnnxEngine(setting, native=False),
    "torch": TorchEngine,
    "genai": GenaiEngine,
    "llama": LlamaEngine,
}
"""Every engine, by the name that `Setting` takes."""

IMPORTS = {
    "native": "lit_binq_onnx.runtime.session",
    "unmodified": "lit_binq_onnx.runtime.session",
    "torch": "lit_binq.models.load",
    "genai": "onnxruntime_genai",
    "llama": "llama_cpp",
}
"""What an engine imports before its model is opened: loading is timed without it."""
