"""Writing and scoring text with an exported model: the same tokens and the same perplexity as torch."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import lit_binq_onnx.runtime.generate as generate_module
import lit_binq_onnx.runtime.perplexity as perplexity_module
from exporting import export
from lit_binq.evaluation.perplexity import TokenPerplexity
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.generate import (
    Generation,
    GenerationStats,
    Generator,
    Sampling,
    choose,
    encode_prompt,
    generate,
    own_sampling,
    penalize,
    stop_tokens,
)
from lit_binq_onnx.runtime.perplexity import onnx_perplexity, token_nll
from lit_binq_onnx.runtime.session import OnnxModel

TOKENIZER = byte_tokenizer()
PROMPT = "The cat sat on"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, OnnxModel]:
    # not tied: a random model with tied embeddings repeats one token for ever
    folder = tmp_path_factory.mktemp("generate") / "qwen3"
    model = export("qwen3", folder)
    return model, OnnxModel(folder, native=False, threads=1)


@torch.no_grad()
def torch_greedy(model: PreTrainedModel, prompt: str, count: int) -> list[int]:
    """The likeliest token each time, everything computed anew: no cache to be wrong about."""
    ids = TOKENIZER(prompt)["input_ids"]
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_greedy_tokens_equal_torch(qwen: tuple[PreTrainedModel, OnnxModel]) -> None:
    model, onnx_model = qwen
    expected = torch_greedy(model, PROMPT, 12)
    assert len(set(expected)) > 2
    generation = generate(onnx_model, TOKENIZER, PROMPT, 12)
    text = "".join(generation)
    assert generation.token_ids == expected
    assert text == TOKENIZER.decode(expected, skip_special_tokens=True)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_steps) == (len(PROMPT), 12, 11)
    assert not stats.stopped
    assert stats.prefill_seconds > 0
    assert stats.tokens_per_second == stats.decode_steps / stats.decode_seconds


def test_prefill_in_parts_changes_nothing(
    qwen: tuple[PreTrainedModel, OnnxModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "PREFILL", 3)
    generation = generate(qwen[1], TOKENIZER, PROMPT, 5)
    list(generation)
    assert generation.token_ids == torch_greedy(qwen[0], PROMPT, 5)


def test_text_comes_while_it_is_written() -> None:
    taken = []

    def tokens() -> Iterator[int]:
        for token in TOKENIZER("a€b")["input_ids"]:
            taken.append(token)
            yield token

    generation = Generation(tokens(), TOKENIZER, GenerationStats())
    assert [(piece, len(taken)) for piece in generation] == [("a", 1), ("€", 4), ("b", 5)]


def test_stop_tokens_end_the_text(qwen: tuple[PreTrainedModel, OnnxModel], tmp_path: Path) -> None:
    model, onnx_model = qwen
    expected = torch_greedy(model, PROMPT, 8)
    stop = expected[3]
    folder = Path(shutil.copytree(onnx_model.folder, tmp_path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    ending = OnnxModel(folder, native=False)
    assert stop_tokens(ending, TOKENIZER) == {1, stop, 257}
    generation = generate(ending, TOKENIZER, PROMPT, 8)
    list(generation)
    assert generation.token_ids == expected[: expected.index(stop)]
    assert generation.stats.stopped
    assert generation.stats.new_tokens == expected.index(stop)


def test_sampling_follows_its_seed(qwen: tuple[PreTrainedModel, OnnxModel]) -> None:
    def tokens(seed: int) -> list[int]:
        generation = generate(qwen[1], TOKENIZER, PROMPT, 10, temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        list(generation)
        return generation.token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30), st.integers(1, 30), st.integers(0, 9))
def test_sampling_keeps_to_the_likeliest(values: list[float], k: int, seed: int) -> None:
    logits, rng = np.array(values, np.float32), np.random.default_rng(seed)
    allowed = np.sort(logits)[::-1][:k].min()
    assert logits[choose(logits, rng, temperature=1.0, top_k=k, top_p=1.0)] >= allowed
    assert logits[choose(logits, rng, temperature=1.0, top_k=0, top_p=1e-9)] == logits.max()
    assert choose(logits, rng, temperature=0.0, top_k=0, top_p=1.0) == logits.argmax()


def test_sampling_frequencies() -> None:
    p = np.array([0.1, 0.6, 0.3])
    logits, rng = np.log(p).astype(np.float32), np.random.default_rng(0)
    draw = [choose(logits, rng, temperature=1.0, top_k=0, top_p=1.0) for _ in range(3000)]
    np.testing.assert_allclose(np.bincount(draw, minlength=3) / 3000, p, atol=0.03)
    # 0.6 alone is short of 0.7, so the token that crosses it stays and the third goes
    draw = [choose(logits, rng, temperature=1.0, top_k=0, top_p=0.7) for _ in range(3000)]
    np.testing.assert_allclose(np.bincount(draw, minlength=3) / 3000, [0, 2 / 3, 1 / 3], atol=0.03)
    draw = [choose(logits, rng, temperature=0.5, top_k=2, top_p=1.0) for _ in range(3000)]
    np.testing.assert_allclose(np.bincount(draw, minlength=3) / 3000, [0, 0.8, 0.2], atol=0.03)


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=20))
def test_no_piece_holds_half_a_character(text: str) -> None:
    # one token a byte: every character beyond ASCII is spread over two to four tokens
    generation = Generation(iter(TOKENIZER(text)["input_ids"]), TOKENIZER, GenerationStats())
    pieces = list(generation)
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_text_that_ends_within_a_character() -> None:
    tokens = TOKENIZER("a€")["input_ids"][:-1]
    pieces = list(Generation(iter(tokens), TOKENIZER, GenerationStats()))
    assert pieces[0] == "a"
    assert set("".join(pieces[1:])) == {"�"}


def test_positions_run_out(qwen: tuple[PreTrainedModel, OnnxModel], caplog: pytest.LogCaptureFixture) -> None:
    generation = generate(qwen[1], TOKENIZER, "x" * 125, 10)
    list(generation)
    assert generation.stats.new_tokens == 3
    assert "max_new_tokens: 10 cut to 3" in caplog.text
    with pytest.raises(RunError, match="prompt: got 128 tokens, expected fewer than the model's 128"):
        generate(qwen[1], TOKENIZER, "x" * 128, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"prompt": ""}, "prompt: got an empty one"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_options(qwen: tuple[PreTrainedModel, OnnxModel], options: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        generate(qwen[1], TOKENIZER, **{"prompt": PROMPT, **options})  # type: ignore[arg-type]  # of mixed types


def test_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "<{{ messages[0]['role'] }}>{{ messages[0]['content'] }}{{ '|' if add_generation_prompt }}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", chat=True)) == "<user>Hi|"


# --- perplexity


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(3))


def test_perplexity_equals_torch(
    qwen: tuple[PreTrainedModel, OnnxModel], windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, onnx_model = qwen
    metric = TokenPerplexity()
    with torch.no_grad():
        metric.update(model(input_ids=windows).logits, windows)
    for batch, room in ((4, 1 << 26), (1, 1 << 26), (3, 3 * 7 * 260 * 4)):
        monkeypatch.setattr(perplexity_module, "LOGITS_BYTES", room)
        result = onnx_perplexity(onnx_model, windows.numpy() if batch == 1 else windows, batch=batch)
        assert result.tokens == 5 * 39
        np.testing.assert_allclose(result.ppl, float(metric.compute()), rtol=1e-5)
        np.testing.assert_allclose(result.nll, float(metric.nll), rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 1e4))
def test_likelihood_at_any_size_of_logits(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (size * rng.standard_normal((6, 11))).astype(np.float32)
    target = rng.integers(0, 11, 6)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(target), reduction="none"
    )
    np.testing.assert_allclose(token_nll(logits, target), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 1), np.int64), r"windows: got int64 of shape \(2, 1\)"),
        (np.zeros(7, np.int64), r"of shape \(7,\)"),
        (np.zeros((2, 8)), "windows: got float64"),
        (np.zeros((0, 8), np.int64), r"of shape \(0, 8\)"),
        (np.zeros((1, 129), np.int64), "got 129 tokens each, expected at most the model's 128"),
    ],
)
def test_bad_windows(qwen: tuple[PreTrainedModel, OnnxModel], bad: np.ndarray, message: str) -> None:
    with pytest.raises(RunError, match=message):
        onnx_perplexity(qwen[1], bad)


def _state(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_a_models_own_settings_are_the_defaults_and_options_win(tmp_path):
    assert own_sampling(tmp_path) == Sampling()  # no file
    own = _state(tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1)
    assert own_sampling(own) == Sampling(0.6, 20, 0.9, 0, 1.1)
    assert own_sampling(own, temperature=0.0, top_k=None, repetition_penalty=1.0, seed=3) == Sampling(0.0, 20, 0.9, 3)
    # As transformers fills in what is not stated, and takes the likeliest token without do_sample.
    assert own_sampling(_state(tmp_path, do_sample=True)) == Sampling(1.0, 50)
    assert own_sampling(_state(tmp_path, temperature=0.6, top_p=0.9)) == Sampling()
    odd = _state(tmp_path, do_sample=True, temperature=None, top_k=0, top_p=0, repetition_penalty=None)
    assert own_sampling(odd) == Sampling(1.0, 0)
    with pytest.raises(RunError, match="repetition_penalty"):
        own_sampling(tmp_path, repetition_penalty=0.0)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300).astype(np.float32)
    logits[5] = 0
    seen = [3, 5, 299, 3, *rng.integers(0, 300, 40).tolist()]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.tensor(logits)[None].clone())[0]
    before = logits.copy()
    np.testing.assert_array_equal(penalize(logits, set(seen), penalty), expected.numpy())
    np.testing.assert_array_equal(logits, before)


@torch.no_grad()
def test_text_with_a_penalty_is_what_transformers_would_write(qwen: tuple[PreTrainedModel, OnnxModel]) -> None:
    """Greedy, over prompt and text, one text and several; everything computed anew for each token."""
    model, onnx_model = qwen
    ids, process = TOKENIZER(PROMPT)["input_ids"], RepetitionPenaltyLogitsProcessor(1.5)
    for _ in range(12):
        logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
        ids.append(int(process(torch.tensor([ids]), logits).argmax()))
    sampling, generator = Sampling(repetition_penalty=1.5), Generator(onnx_model, TOKENIZER)
    text = generator.stream(PROMPT, 12, sampling=sampling)
    list(text)
    assert text.token_ids == ids[-12:]
    assert ids[-12:] != torch_greedy(model, PROMPT, 12)
    assert generator.batch([PROMPT, "a"], 12, sampling=sampling)[0].token_ids == ids[-12:]


def test_a_prompt_that_is_not_utf8_is_one_line():
    broken = os.fsdecode(b"caf\xe9")  # as a shell hands it over
    for prompt, chat in ((broken, False), ([{"role": "user", "content": broken}], True)):
        with pytest.raises(RunError, match=r"^prompt: .*UTF-8"):
            encode_prompt(TOKENIZER, prompt, chat=chat)
