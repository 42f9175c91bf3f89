"""Writing text with an exported model: greedy or sampled, piece by piece as it is decoded, one text or several.

    generator = Generator(OnnxModel("runs/demo/onnx"), load_tokenizer("runs/demo/onnx"))
    for piece in generator.stream("The history of", 64):
        print(piece, end="", flush=True)
    answer = "".join(generator.chat([{"role": "user", "content": "Hello!"}], sampling=Sampling(temperature=0.8)))
    texts = generator.batch(["One day", "The sea", "A letter"], 32)

Knows a session and a tokenizer: that of `tokens.load_tokenizer`, or one of transformers. Between two passes of the
model there is little: a token is chosen without sorting the vocabulary, and its text is found from a short tail.

Legend: V vocabulary, T temperature.
"""

import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.rows import PREFILL, start_rows
from lit_binq_onnx.runtime.session import OnnxModel
from lit_binq_onnx.runtime.tokens import TextTokenizer

log = logging.getLogger(__name__)

_INCOMPLETE = "�"
"""What a decoder shows for bytes that are not yet a whole character."""

_BLOCK = 64
"""Logits whose maximum is taken together where the likeliest few are looked for."""


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

    def __init__(self, tokens: Iterator[int], tokenizer: TextTokenizer, stats: GenerationStats) -> None:
        self.stats = stats
        self.token_ids: list[int] = []
        self._pieces = self._decode(tokens, tokenizer)

    def __next__(self) -> str:
        return next(self._pieces)

    def _decode(self, tokens: Iterator[int], tokenizer: TextTokenizer) -> Iterator[str]:
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


def stop_tokens(onnx_model: OnnxModel, tokenizer: TextTokenizer) -> set[int]:
    """Tokens that end a text, from generation_config.json, config.json and the tokenizer."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        path = onnx_model.folder / name
        if path.is_file():
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    return found


Messages = Sequence[dict[str, str]]
"""A conversation: {"role": "system", "user" or "assistant", "content": text}, oldest first."""


def encode_prompt(tokenizer: TextTokenizer, prompt: str | Messages, *, chat: bool = False) -> list[int]:
    """Token numbers of a prompt.

    Args:
        tokenizer: the model's.
        prompt: text to go on from, or with `chat` the user's message or a whole conversation.
        chat: put it into the tokenizer's chat template.

    Raises:
        RunError: there is no chat template, or the prompt has no tokens.
    """
    texts = [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise RunError("prompt: got bytes that are not UTF-8, expected text in UTF-8")
    text = prompt if isinstance(prompt, str) else ""
    if chat:
        if not tokenizer.chat_template:
            raise RunError("chat: this tokenizer has no chat template; expected one: leave out `chat`")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    if not ids:
        raise RunError("prompt: got an empty one, expected at least one token: give some text")
    return ids


def _candidates(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[np.ndarray, float]:
    """Tokens, in order of number, among which those that `choose` may take surely are: what is sorted is few.

    Also how much of the probability they have.
    """
    size = len(logits)
    blocks = size // _BLOCK
    if 0 < top_k <= blocks:
        # As many blocks as tokens are wanted reach this value, so the wanted tokens do.
        largest = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(1)
        return np.flatnonzero(logits >= np.partition(largest, blocks - top_k)[blocks - top_k]), 1.0
    if top_k == 0 and top_p < 1:
        # All tokens below this bound together have less than what top_p leaves out. Half: for the rounding.
        p = np.exp((logits - logits.max()) / np.float32(temperature))
        total = p.sum(dtype=np.float64)
        order = np.flatnonzero(p >= 0.5 * (1 - top_p) / size * total)
        return order, float(p[order].sum(dtype=np.float64) / total)
    return np.arange(size), 1.0


def choose(logits: np.ndarray, rng: np.random.Generator, *, temperature: float, top_k: int, top_p: float) -> int:
    """The next token.

    Args:
        logits: (V,) float32.
        rng: source of the sampling; not used at temperature 0.
        temperature: T; 0 takes the likeliest token.
        top_k: sample among the k likeliest, of equal ones the first; 0 means all.
        top_p: then among the likeliest of those that together have this probability.
    """
    if temperature == 0:
        return int(logits.argmax())
    order, share = _candidates(logits, temperature, top_k, top_p)
    values = logits[order]
    if top_k or top_p < 1:
        ranks = np.argsort(-values, kind="stable")[: top_k or None]
        order, values = order[ranks], values[ranks]
    scaled = values.astype(np.float64) / temperature
    total = np.cumsum(np.exp(scaled - scaled.max()))
    if top_p < 1:  # the token that crosses top_p is still in, so at least one is
        total = total[: int(np.searchsorted(total, top_p / share * total[-1])) + 1]
    drawn = np.searchsorted(total, rng.random() * total[-1], side="right")
    return int(order[min(int(drawn), len(total) - 1)])


def penalize(logits: np.ndarray, seen: Collection[int], penalty: float) -> np.ndarray:
    """Logits with those of tokens already seen made smaller: positive ones divided, negative ones multiplied.

    Keskar et al. 2019 (CTRL), section 4.1, with the sign looked at as is usual: a negative logit divided would grow.

    Args:
        logits: (V,) float32; left as they are.
        seen: token numbers.
        penalty: above 1 makes them less likely, below 1 more.
    """
    at = np.fromiter(seen, np.int64, len(seen))
    values = logits[at]
    logits = logits.copy()
    logits[at] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return logits


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: then among the likeliest tokens that together have this probability.
        seed: of the sampling; rows of a batch get seeds of their own from it.
        repetition_penalty: makes tokens of the prompt and of the text less likely, see `penalize`; 1 does nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for ok, name, got, expected in (
            (0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1"),
            (self.seed >= 0, "seed", self.seed, "0 or more"),
            (0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0"),
        ):
            if not ok:
                raise RunError(f"{name}: got {got}, expected {expected}")

    def choose(self, logits: np.ndarray, rng: np.random.Generator, seen: Collection[int] = ()) -> int:
        """The next token after the tokens `seen`; see `choose`."""
        if self.repetition_penalty != 1:
            logits = penalize(logits, seen, self.repetition_penalty)
        return choose(logits, rng, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def own_sampling(folder: Path, **given: float | None) -> Sampling:
    """How a model's own generation_config.json would have its next token chosen, where nothing else is asked for.

    As transformers reads it: without `do_sample` the likeliest token is taken; with it, what is not stated is
    temperature 1, the 50 likeliest tokens, all of the probability.

    Args:
        folder: of the exported model; without the file, or one that states none of this, greedy.
        given: fields of `Sampling`; those that are not None go before the file's.

    Raises:
        RunError: a value outside its range.
    """
    path, own = folder / "generation_config.json", dict[str, float]()
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def number(name: str, default: float) -> float:
        value = stated.get(name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default

    if stated.get("do_sample"):
        own = {"temperature": max(number("temperature", 1.0), 0.0), "top_k": max(int(number("top_k", 50)), 0)}
        own["top_p"] = top_p if 0 < (top_p := number("top_p", 1.0)) <= 1 else 1.0
    if (penalty := number("repetition_penalty", 1.0)) > 0:
        own["repetition_penalty"] = penalty
    return Sampling(**own | {name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Text:
    """One text of a batch.

    Attributes:
        text: what was written, without the prompt.
        token_ids: its tokens, without the stop token.
        stopped: whether a stop token ended it, rather than a limit.
    """

    text: str
    token_ids: list[int]
    stopped: bool


class Generator:
    """Text from an exported model: streamed, in conversation, or several at once.

    The cache stays in ONNX Runtime. On the fused route it is allocated once for a text, and each prompt of a batch is
    read without padding; on the generic route a batch is padded on the left.

    Args:
        onnx_model: an exported model.
        tokenizer: its tokenizer.
        stop: tokens that end a text beside those that the model's and the tokenizer's files name.

    Attributes:
        stop: all of them.
    """

    def __init__(self, onnx_model: OnnxModel, tokenizer: TextTokenizer, *, stop: Sequence[int] = ()) -> None:
        self.onnx_model, self.tokenizer = onnx_model, tokenizer
        self.stop = stop_tokens(onnx_model, tokenizer) | set(stop)

    def stream(
        self, prompt: str | Messages, max_new_tokens: int = 128, *, sampling: Sampling | None = None, chat: bool = False
    ) -> Generation:
        """Go on from a prompt, piece by piece.

        Args:
            prompt: text to go on from; with `chat` the user's message or a conversation.
            max_new_tokens: most tokens to write; fewer where the model has no more positions.
            sampling: greedy if None.
            chat: put the prompt into the tokenizer's chat template.

        Returns:
            An iterator over pieces of text, none of them with half a character; its `stats` fill as it is read.

        Raises:
            RunError: an option out of its range, an empty prompt, or one longer than the model's positions.
        """
        ids = encode_prompt(self.tokenizer, prompt, chat=chat)
        count = self._room([ids], max_new_tokens)
        stats = GenerationStats(prompt_tokens=len(ids))
        return Generation(self._tokens(ids, count, sampling or Sampling(), stats), self.tokenizer, stats)

    def chat(
        self, messages: str | Messages, max_new_tokens: int = 128, *, sampling: Sampling | None = None
    ) -> Generation:
        """The model's answer in a conversation; see `stream`."""
        return self.stream(messages, max_new_tokens, sampling=sampling, chat=True)

    def batch(
        self,
        prompts: Sequence[str | Messages],
        max_new_tokens: int = 128,
        *,
        sampling: Sampling | None = None,
        chat: bool = False,
    ) -> list[Text]:
        """Go on from several prompts at once; arguments and errors as `stream`.

        A text that ends leaves the batch. The tokens are those that `stream` writes, up to rounding.
        """
        if not prompts:
            raise RunError("prompts: got none, expected one or more")
        sampling = sampling or Sampling()
        encoded = [encode_prompt(self.tokenizer, prompt, chat=chat) for prompt in prompts]
        count = self._room(encoded, max_new_tokens)
        # the first row's is what `stream` uses
        sources = [np.random.default_rng(sampling.seed if i == 0 else [sampling.seed, i]) for i in range(len(prompts))]
        written: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        seen = [set(ids) for ids in encoded]
        rows, alive = start_rows(self.onnx_model, encoded, count, part=PREFILL), list(range(len(prompts)))
        while True:
            tokens = [sampling.choose(rows.logits[k], sources[i], seen[i]) for k, i in enumerate(alive)]
            going = []
            for k, i in enumerate(alive):
                stopped[i] = tokens[k] in self.stop
                if not stopped[i]:
                    written[i].append(tokens[k])
                    seen[i].add(tokens[k])
                    if len(written[i]) < count:
                        going.append(k)
            if not going:
                break
            if len(going) < len(alive):
                rows.keep(going)
                alive = [alive[k] for k in going]
            rows.step([tokens[k] for k in going])
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
        return [Text(*fields) for fields in zip(texts, written, stopped, strict=True)]

    def _room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """How many tokens can be written after these prompts.

        Raises:
            RunError: none.
        """
        if max_new_tokens < 1:
            raise RunError(f"max_new_tokens: got {max_new_tokens}, expected 1 or more")
        longest, limit = max(map(len, prompts)), self.onnx_model.facts.get("max_positions")
        if limit is not None and longest >= limit:
            raise RunError(
                f"prompt: got {longest} tokens, expected fewer than the model's {limit} positions: shorten `prompt`"
            )
        if limit is not None and longest + max_new_tokens > limit:
            left = limit - longest
            log.warning("max_new_tokens: %d cut to %d, the model has %d positions", max_new_tokens, left, limit)
            return int(left)
        return max_new_tokens

    def _tokens(self, ids: list[int], count: int, sampling: Sampling, stats: GenerationStats) -> Iterator[int]:
        """New tokens of one text, timed."""
        rng = np.random.default_rng(sampling.seed)
        start = time.perf_counter()
        rows = start_rows(self.onnx_model, [ids], count, part=PREFILL)
        seen = set(ids)
        token = sampling.choose(rows.logits[0], rng, seen)
        stats.prefill_seconds = time.perf_counter() - start
        while token not in self.stop:
            stats.new_tokens += 1
            yield token
            if stats.new_tokens == count:
                return
            start = time.perf_counter()  # what the reader does with the text is not counted
            rows.step([token])
            seen.add(token)
            token = sampling.choose(rows.logits[0], rng, seen)
            stats.decode_seconds += time.perf_counter() - start
            stats.decode_steps += 1
        stats.stopped = True


def generate(
    onnx_model: OnnxModel,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Generation:
    """`Generator.stream` in one call; options of the sampling as in `Sampling`, the model's own where None."""
    sampling = own_sampling(
        onnx_model.folder,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return Generator(onnx_model, tokenizer).stream(prompt, max_new_tokens, sampling=sampling, chat=chat)
