"""Writing text with an exported model: greedy or sampled, piece by piece as it is decoded.

Knows a session and a tokenizer.

Legend: V vocabulary, T temperature.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_binq.errors import LitBinqError
from lit_binq_onnx.session import OnnxModel

log = logging.getLogger(__name__)

PREFILL = 256
"""Prompt tokens in one pass: bounds the logits of the prefill to PREFILL x V x 4 bytes."""

_INCOMPLETE = "�"
"""What a decoder shows for bytes that are not yet a whole character."""


@dataclass
class GenerationStats:
    """Figures of one generation; complete once its text has been read to the end.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens written, the stop token not counted.
        prefill_seconds: from the start to the first new token.
        decode_seconds: for all steps after that.
        decode_steps: number of these steps.
        stopped: whether a stop token ended the text, rather than a limit.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    stopped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Decoding steps a second, the prefill left out; 0 before the second token."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0


class Generation(Iterator[str]):
    """Pieces of text as they come; see `generate`.

    Attributes:
        stats: figures so far.
        token_ids: new tokens so far.
    """

    def __init__(self, tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase, stats: GenerationStats) -> None:
        self.stats = stats
        self.token_ids: list[int] = []
        self._pieces = self._decode(tokens, tokenizer)

    def __next__(self) -> str:
        return next(self._pieces)

    def _decode(self, tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """Text of the tokens; a character whose bytes are spread over tokens waits until it is whole.

        Only a short tail is decoded again for each token: from `start`, where the last piece given out began,
        so that a tokenizer that puts spaces between words sees the word before.
        """
        start = given = 0  # token_ids[start:given] is the text given out last

        def text(stop: int | None = None) -> str:
            return str(tokenizer.decode(self.token_ids[start:stop], skip_special_tokens=True))

        for token in tokens:
            self.token_ids.append(token)
            before, now = text(given), text()
            if len(now) > len(before) and not now.endswith(_INCOMPLETE):
                yield now[len(before) :]
                start, given = given, len(self.token_ids)
        before, now = text(given), text()
        if len(now) > len(before):  # the text ended within a character
            yield now[len(before) :]


def stop_tokens(onnx_model: OnnxModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text, from generation_config.json, config.json and the tokenizer."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        path = onnx_model.folder / name
        if path.is_file():
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    return found


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> list[int]:
    """Token numbers of a prompt.

    Args:
        tokenizer: the model's.
        prompt: text to go on from, or with `chat` the user's message.
        chat: put it into the tokenizer's chat template.

    Raises:
        LitBinqError: there is no chat template, or the prompt has no tokens.
    """
    if chat:
        if not tokenizer.chat_template:
            raise LitBinqError("chat: this tokenizer has no chat template; expected one: leave out `chat`")
        message = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not ids:
        raise LitBinqError("prompt: got an empty one, expected at least one token: give some text")
    return ids


def choose(logits: np.ndarray, rng: np.random.Generator, *, temperature: float, top_k: int, top_p: float) -> int:
    """The next token.

    Args:
        logits: (V,) float32.
        rng: source of the sampling; not used at temperature 0.
        temperature: T; 0 takes the likeliest token.
        top_k: sample among the k likeliest; 0 means all.
        top_p: then among the likeliest of those that together have this probability.
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    # the token that crosses top_p is still in, so at least one is
    kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1 if top_p < 1 else len(p)
    p = p[:kept] / p[:kept].sum()
    return int(order[rng.choice(len(p), p=p)])


def _refuse(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    for ok, name, got, expected in (
        (max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more"),
        (0 <= temperature < float("inf"), "temperature", temperature, "0 (greedy) or more"),
        (top_k >= 0, "top_k", top_k, "0 (all) or more"),
        (0 < top_p <= 1, "top_p", top_p, "above 0, at most 1"),
        (seed >= 0, "seed", seed, "0 or more"),
    ):
        if not ok:
            raise LitBinqError(f"{name}: got {got}, expected {expected}")


def generate(
    onnx_model: OnnxModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> Generation:
    """Go on from a prompt.

    Args:
        onnx_model: an exported model.
        tokenizer: its tokenizer.
        prompt: text to go on from.
        max_new_tokens: most tokens to write; fewer where the model has no more positions.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of the sampling.
        chat: put the prompt into the tokenizer's chat template as the user's message.

    Returns:
        An iterator over pieces of text, none of them with half a character; its `stats` fill as it is read.

    Raises:
        LitBinqError: an option out of its range, an empty prompt, or one longer than the model's positions.
    """
    _refuse(max_new_tokens, temperature, top_k, top_p, seed)
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    limit = onnx_model.facts.get("max_positions")
    if limit is not None and len(ids) >= limit:
        raise LitBinqError(
            f"prompt: got {len(ids)} tokens, expected fewer than the model's {limit} positions: shorten `prompt`"
        )
    if limit is not None and len(ids) + max_new_tokens > limit:
        log.warning(
            "max_new_tokens: %d cut to %d, the model has %d positions",
            max_new_tokens,
            limit - len(ids),
            limit,
        )
        max_new_tokens = limit - len(ids)
    stats = GenerationStats(prompt_tokens=len(ids))
    rng = np.random.default_rng(seed)
    stop = stop_tokens(onnx_model, tokenizer)

    def tokens() -> Iterator[int]:
        start = time.perf_counter()
        past, total = onnx_model.empty_past(), 0
        new = ids
        while True:
            for i in range(0, len(new), PREFILL):
                part = new[i : i + PREFILL]
                where = np.arange(total, total + len(part))[None]
                total += len(part)
                logits, past = onnx_model.forward(np.array([part]), np.ones((1, total)), where, past)
            token = choose(logits[0, -1], rng, temperature=temperature, top_k=top_k, top_p=top_p)
            spent = time.perf_counter() - start
            if total == len(ids):
                stats.prefill_seconds = spent
            else:
                stats.decode_seconds += spent
                stats.decode_steps += 1
            if token in stop:
                stats.stopped = True
                return
            stats.new_tokens += 1
            yield token
            if stats.new_tokens == max_new_tokens:
                return
            start, new = time.perf_counter(), [token]  # what the reader does with the text is not counted

    return Generation(tokens(), tokenizer, stats)
