"""The class Generator on both routes: the same tokens, alone and in batches, streamed, sampled, stopped, in a chat."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from transformers import PreTrainedModel

import lit_binq_onnx.runtime.generate as generate_module
from exporting import fusable_model
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.generate import Generator, Sampling, encode_prompt
from lit_binq_onnx.runtime.session import OnnxModel

TOKENIZER = byte_tokenizer()
PROMPTS = ["The cat sat on", "A", "In 1984 the dog saw twice"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    # not tied, and a window of 8: a text that is short, one that is long, and none that repeats a token for ever
    path = tmp_path_factory.mktemp("generator") / "mistral"
    model = fusable_model("mistral")
    assert export_onnx(model, TOKENIZER, path, check=False)["fused"]
    return model, path


@pytest.fixture(scope="module", params=["fused", "generic"])
def generator(request: pytest.FixtureRequest, folder: tuple[PreTrainedModel, Path]) -> Generator:
    model = OnnxModel(folder[1], native=False, mode="exact", threads=1, route=request.param)
    assert model.route == request.param
    return Generator(model, TOKENIZER)


@torch.no_grad()
def torch_greedy(model: PreTrainedModel, prompt: str, count: int) -> list[int]:
    """The likeliest token each time, everything computed anew."""
    ids = TOKENIZER(prompt)["input_ids"]
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.grid(1)
def test_streamed_and_batched_tokens_equal_torch(
    generator: Generator, folder: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [torch_greedy(folder[0], prompt, 16) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 2 for tokens in expected)
    for part in (256, 4):
        monkeypatch.setattr(generate_module, "PREFILL", part)
        texts = generator.batch(PROMPTS, 16)
        assert [text.token_ids for text in texts] == expected
        assert not any(text.stopped for text in texts)
    for prompt, tokens, text in zip(PROMPTS, expected, texts, strict=True):
        generation = generator.stream(prompt, 16)
        assert "".join(generation) == text.text
        assert generation.token_ids == tokens


def test_texts_leave_the_batch_one_by_one(generator: Generator, folder: tuple[PreTrainedModel, Path]) -> None:
    """A stop token that only one of the texts writes ends that one; the others' tokens do not change."""
    expected = [torch_greedy(folder[0], prompt, 16) for prompt in PROMPTS]
    for victim in range(3):
        others = {token for i, tokens in enumerate(expected) if i != victim for token in tokens}
        stop = next((t for t in expected[victim][1:] if t not in others), None)
        if stop is None:
            continue
        stopping = Generator(generator.onnx_model, TOKENIZER, stop=[stop])
        texts = stopping.batch(PROMPTS, 16)
        assert [text.stopped for text in texts] == [i == victim for i in range(3)]
        for i, text in enumerate(texts):
            wanted = expected[i][: expected[i].index(stop)] if i == victim else expected[i]
            assert text.token_ids == wanted
        alone = stopping.stream(PROMPTS[victim], 16)
        list(alone)
        assert alone.stats.stopped
        assert alone.token_ids == texts[victim].token_ids
        return
    pytest.fail("every text of this model writes the others' tokens: change its seed")


def test_sampling_follows_its_seed(generator: Generator) -> None:
    def tokens(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        alone = generator.stream(PROMPTS[0], 8, sampling=sampling)
        list(alone)
        batch = [text.token_ids for text in generator.batch([PROMPTS[0]] * 3, 8, sampling=sampling)]
        assert batch[0] == alone.token_ids
        assert batch[1] != batch[2]
        return batch

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_conversations(generator: Generator) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ '|' if add_generation_prompt }}"
    )
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "No"},
    ]
    assert tokenizer.decode(encode_prompt(tokenizer, talk, chat=True)) == "<user>Hi<assistant>Yes?<user>No|"
    chatting = Generator(generator.onnx_model, tokenizer)
    answer, plain = chatting.chat(talk, 8), chatting.stream("<user>Hi<assistant>Yes?<user>No|", 8)
    assert ("".join(answer), answer.token_ids) == ("".join(plain), plain.token_ids)
    assert chatting.batch([talk], 8, chat=True)[0].token_ids == plain.token_ids


def test_the_cache_is_as_long_as_the_text(
    folder: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnnxModel(folder[1], native=False, mode="exact", threads=1)
    made = []
    empty = model.empty_past
    monkeypatch.setattr(model, "empty_past", lambda *a: made.append(empty(*a)) or made[-1])
    list(Generator(model, TOKENIZER).stream(PROMPTS[0], 10))
    assert [cache.capacity for cache in made] == [len(PROMPTS[0]) + 10]
    assert made[0].length == len(PROMPTS[0]) + 9  # the last token is not fed


def test_bad_options(generator: Generator) -> None:
    for options, message in (
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"seed": -1}, "seed: got -1"),
    ):
        with pytest.raises(RunError, match=message):
            Sampling(**options)  # type: ignore[arg-type]  # of mixed types
    with pytest.raises(RunError, match="prompts: got none"):
        generator.batch([])
    with pytest.raises(RunError, match="prompt: got an empty one"):
        generator.batch(["a", ""])
    with pytest.raises(RunError, match="prompt: got 128 tokens"):
        generator.batch(["a", "x" * 128], 1)
    with pytest.raises(RunError, match="max_new_tokens: got 0"):
        generator.stream("a", 0)


def test_choice_of_tokens() -> None:
    logits, rng = np.array([0.0, 3.0, 1.0], np.float32), np.random.default_rng(0)
    assert Sampling().choose(logits, rng) == 1
    assert {Sampling(temperature=5.0, top_k=2).choose(logits, rng) for _ in range(50)} == {1, 2}
