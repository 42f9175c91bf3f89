"""Decoding with everything bound once gives the numbers of a whole pass, whatever happened to the cache before."""

import numpy as np
import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from exporting import fusable_model
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.cache import StaticCache
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.generate import choose
from lit_binq_onnx.runtime.session import OnnxModel


@pytest.fixture(scope="module", params=["mistral", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder = tmp_path_factory.mktemp("step") / request.param  # Mistral's attention has a window
    export_onnx(fusable_model(request.param), byte_tokenizer(), folder, check=False)
    opened = OnnxModel(folder, native=False, mode="exact", threads=1)
    assert opened.route == "fused"
    return opened


def start(model: OnnxModel, ids: np.ndarray, lengths: np.ndarray, capacity: int) -> StaticCache:
    """A cache with these rows, padded on the right."""
    cache = model.empty_past(len(ids), capacity)
    mask, where = np.arange(ids.shape[1]) < lengths[:, None], np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    model.forward(ids, mask, where, cache)
    assert isinstance(cache, StaticCache)
    return cache


def by_forward(model: OnnxModel, tokens: np.ndarray, cache: StaticCache) -> np.ndarray:
    lengths = cache.lengths + 1
    mask = np.arange(lengths.max()) < lengths[:, None]
    return model.forward(tokens[:, None], mask, lengths[:, None] - 1, cache)[0][:, -1]


@pytest.mark.grid(1)
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_equal_whole_passes(model: OnnxModel, rows: int) -> None:
    """Bit for bit; the cache too. Rows of different lengths, and more tokens than the first buffers hold."""
    rng = np.random.default_rng(rows)
    ids, lengths = rng.integers(0, 256, (rows, 9)), np.array([9, 4, 6])[:rows]
    bound, whole = (start(model, ids, lengths, 14) for _ in range(2))
    for _ in range(12):
        tokens = rng.integers(0, 256, rows)
        np.testing.assert_array_equal(model.step(tokens, bound), by_forward(model, tokens, whole))
    assert bound.capacity == 28  # it has moved once
    np.testing.assert_array_equal(bound.lengths, lengths + 12)
    for i, length in enumerate(bound.lengths):
        for mine, theirs in zip(bound.arrays(), whole.arrays(), strict=True):
            np.testing.assert_array_equal(mine[i, :, :length], theirs[i, :, :length])


@pytest.mark.slow
def test_a_cache_that_others_change_too(model: OnnxModel) -> None:
    """A rewind, another pass between two steps, a row that leaves, a failed step: the next step is right."""
    rng = np.random.default_rng(5)
    cache = start(model, rng.integers(0, 256, (2, 7)), np.array([7, 5]), 40)
    tokens = rng.integers(0, 256, (4, 2))
    first = [model.step(t, cache).copy() for t in tokens]
    cache.lengths = np.array([7, 5])
    np.testing.assert_array_equal(model.step(tokens[0], cache), first[0])
    np.testing.assert_array_equal(by_forward(model, tokens[1], cache), first[1])
    with pytest.raises(RunError, match="ONNX Runtime failed on input_ids"):
        model.step(np.array([10**6, 0]), cache)
    np.testing.assert_array_equal(model.step(tokens[2], cache), first[2])
    alone = cache.keep([1])
    np.testing.assert_allclose(model.step(tokens[3, 1:], alone)[0], first[3][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.step(tokens[3], cache), first[3])  # the rows kept elsewhere are copies


def test_positions_run_out(model: OnnxModel) -> None:
    cache = start(model, np.full((1, 127), 65), np.array([127]), 127)
    model.step(np.array([65]), cache)
    with pytest.raises(RunError, match="cache: got 129 tokens, expected at most the model's 128"):
        model.step(np.array([65]), cache)
    assert cache.length == 128


def all_sorted(
    logits: np.ndarray, rng: np.random.Generator, temperature: float, top_k: int, top_p: float
) -> tuple[int, float]:
    """The choice by sorting the whole vocabulary, and the smallest relative distance to another choice."""
    everything = top_k == 0 and top_p == 1
    order = np.arange(len(logits)) if everything else np.argsort(-logits, kind="stable")[: top_k or None]
    p = np.exp(logits[order].astype(np.float64) / temperature - logits.max() / temperature)
    total = np.cumsum(p)
    crossing = top_p * total[-1]
    margin = np.abs(total - crossing).min() / total[-1] if top_p < 1 else 1.0
    total = total[: int(np.searchsorted(total, crossing)) + 1] if top_p < 1 else total
    drawn = rng.random() * total[-1]
    margin = min(margin, np.abs(total[:-1] - drawn).min(initial=1) / total[-1])
    return int(order[np.searchsorted(total, drawn, side="right")]), float(margin)


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 700),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([0, 3]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 4, 50, 10**6]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
)
def test_choosing_without_sorting_everything(
    size: int, seed: int, levels: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = 3 * np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if levels:  # many equal ones
        logits = np.rint(logits / 3 * levels).astype(np.float32)
    expected, margin = all_sorted(logits, np.random.default_rng(seed), temperature, top_k, top_p)
    chosen = choose(logits, np.random.default_rng(seed), temperature=temperature, top_k=top_k, top_p=top_p)
    if margin > 1e-6:  # otherwise the two sums may round to different sides
        assert chosen == expected


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("temperature", [0.7, 5.0])
def test_tokens_that_were_never_sorted_count_in_top_p(temperature: float, top_k: int) -> None:
    compared = 0
    for seed in range(200):
        logits = 3 * np.random.default_rng(seed).standard_normal(300).astype(np.float32)
        for top_p in (0.3, 0.9, 0.999):
            expected, margin = all_sorted(logits, np.random.default_rng(seed), temperature, top_k, top_p)
            if margin > 1e-6:
                chosen = choose(logits, np.random.default_rng(seed), temperature=temperature, top_k=top_k, top_p=top_p)
                assert chosen == expected
                compared += 1
    assert compared > 500
