"""Shapes by name and from folders, models and tables of random weights."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from lit_binq.formats.registry import packed_linears
from lit_binq_onnx.bench.shapes import BUILT_IN, LAYOUTS, random_model, random_tables, read_shape
from tiny_shapes import IDS, config, shape


@pytest.mark.parametrize(
    ("name", "billions", "hidden", "blocks"),
    [("llama-7b", 6.48, 4096, 32), ("llama-3.2-1b", 0.973, 2048, 16), ("smollm2-135m", 0.1062, 576, 30)],
)
def test_built_in_shapes_are_the_models(name, billions, hidden, blocks):
    found = read_shape(name)
    assert (str(found), found.blocks, found.config.hidden_size) == (name, blocks, hidden)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found.config)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    assert sum(m.weight.numel() for m in linears) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert set(BUILT_IN) == {"llama-7b", "llama-3.2-1b", "smollm2-135m"}


def test_fewer_blocks_say_so_and_windows_go_with_them(tmp_path):
    made = Qwen2Config(**config("qwen2").to_dict() | {"layer_types": ["full_attention", "sliding_attention"]})
    made.save_pretrained(tmp_path / "windowed")
    found = read_shape(str(tmp_path / "windowed" / "config.json"), 1)
    assert (str(found), found.config.layer_types) == ("windowed, 1 of its 2 blocks", ["full_attention"])
    assert str(read_shape(str(tmp_path / "windowed"), 2)) == "windowed"


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_a_random_model_keeps_activations_ordinary(kind):
    made = random_model(shape(hidden_size=256, intermediate_size=512), kind, dense_tables=True)
    sizes = []
    for layer in packed_linears(made).values():
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        sizes.append(float(layer(x).std()))
    assert 0.5 < min(sizes) <= max(sizes) < 2
    with torch.no_grad():
        logits = made(torch.from_numpy(IDS)).logits
    assert bool(torch.isfinite(logits).all())
    assert 1e-3 < float(logits.std()) < 10


def test_random_numbers_are_fixed_by_their_seed_and_differ_by_layer():
    first, again, other = (random_model(shape(), dense_tables=False, seed=seed) for seed in (0, 0, 1))
    codes = [[m.codes for m in packed_linears(model).values()] for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(codes[0], codes[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(codes[0], codes[2], strict=True))
    assert not torch.equal(codes[0][0], codes[0][3])  # q and o of one shape
    assert first.model.embed_tokens.weight.device.type == "meta"  # nothing dense was made
    ones = sum(int(np.unpackbits(c.numpy()).sum()) for c in codes[0]) / sum(8 * c.numel() for c in codes[0])
    assert ones == pytest.approx(0.5, abs=0.02)


def test_tables_are_of_the_size_of_an_embedding():
    four = random_tables(config(), 4)
    assert four is not None
    assert (four.embedding.bits, four.head.bits, four.head.block, four.head.zeros is None) == (8, 4, 32, False)
    for table in four.distinct():
        assert float(table.dense().std()) == pytest.approx(0.02, rel=0.3)
        assert abs(float(table.dense().mean())) < 0.005
    eight, zero = random_tables(config(), 8), random_tables(config(), 0)
    assert eight is not None
    assert eight.embedding is eight.head
    assert zero is None
    untied = random_tables(config(tie_word_embeddings=False), 8)
    assert untied is not None
    assert len(untied.distinct()) == 2
    baseline = random_tables(config(hidden_size=192), 4, block=128, symmetric=True)
    assert baseline is not None
    assert (baseline.head.block, baseline.head.zeros) == (64, None)  # 128 does not divide 192
