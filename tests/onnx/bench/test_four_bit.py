"""The graphs of `bench shape`: both compute what their weights say, and bits are the shape's."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_binq.formats.registry import packed_linears
from lit_binq_onnx.bench.four_bit import FourBitBuilder
from lit_binq_onnx.bench.shape import Options, write_models
from lit_binq_onnx.bench.shapes import LAYOUTS, random_model
from lit_binq_onnx.build.head import stored_values
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.runtime.session import DATA, FUSED, read_facts
from tiny_shapes import IDS, run, shape


def unrounded(path: Path) -> None:
    """Let products read float32 activations: rounding to int8 would hide what is wrong."""
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(graph, path)


def stored(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name: stored_values(tensor, path.parent) for tensor in graph.initializer}


def four_bit_weight(tensors: dict[str, np.ndarray], name: str, K: int) -> np.ndarray:
    """(N, K) float64 of symmetric 4-bit codes, two to a byte, the first in the low half."""
    codes = tensors[f"{name}.codes"]
    q = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float64) - 8
    W = q * tensors[f"{name}.scales"].astype(np.float64).reshape(*codes.shape[:2], 1)
    return W.reshape(len(codes), -1)[:, :K]


def baseline_in_torch(folder: Path, made: Any) -> PreTrainedModel:
    """A dense torch model of what the baseline's graph stores; dense tables."""
    tensors = stored(folder / FUSED)
    dense: Any = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    heads, kv, size = made.num_attention_heads, made.num_key_value_heads, made.head_dim
    with torch.no_grad():
        for number, block in enumerate(dense.model.layers):
            name, attention = f"model.layers.{number}", block.self_attn
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            if f"{name}.self_attn.qkv.codes" in tensors:
                W = four_bit_weight(tensors, f"{name}.self_attn.qkv", made.hidden_size)
                weights = np.split(W, np.cumsum([heads * size, kv * size]))
            else:
                weights = [four_bit_weight(tensors, f"{name}.self_attn.{p}_proj", made.hidden_size) for p in "qkv"]
            layers = dict(zip(parts, weights, strict=True))
            layers[attention.o_proj] = four_bit_weight(tensors, f"{name}.self_attn.o_proj", heads * size)
            for part in ("gate_proj", "up_proj", "down_proj"):
                layer = getattr(block.mlp, part)
                layers[layer] = four_bit_weight(tensors, f"{name}.mlp.{part}", layer.in_features)
            for layer, W in layers.items():
                layer.weight.copy_(torch.from_numpy(W))
                assert W.shape == (layer.out_features, layer.in_features)
        embedding = torch.from_numpy(tensors["model.embed_tokens.weight.float16"].astype(np.float32))
        dense.model.embed_tokens.weight.copy_(embedding)
    return dense


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("block", [16, 128])  # of 128 a row is half a block
def test_the_baseline_computes_what_it_stores(kind, block, tmp_path, monkeypatch):
    made = shape(kind)
    options = Options(head_bits=0, block=block)
    _, baseline = write_models(made, tmp_path, options)
    unrounded(baseline.folder / FUSED)
    with torch.no_grad():
        expected = baseline_in_torch(baseline.folder, made.config)(torch.from_numpy(IDS)).logits[0].numpy()
    got = run(baseline.folder)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_ours_computes_what_the_packed_layers_do(kind, tmp_path):
    made = shape()
    ours, _ = write_models(made, tmp_path, Options(format=kind, head_bits=0))
    with torch.no_grad():
        expected = random_model(made, kind, dense_tables=True)(torch.from_numpy(IDS)).logits[0].numpy()
    np.testing.assert_allclose(run(ours.folder), expected, atol=2e-4 * np.abs(expected).max(), rtol=0)


def test_biases_are_added_behind_the_packed_product(tmp_path):
    """Qwen 2 has them at q, k and v."""
    model: Any = random_model(shape("qwen2"), dense_tables=True)
    for number, layer in enumerate(m for m in packed_linears(model).values() if m.bias is not None):
        layer.bias.copy_(torch.arange(layer.out_features) / 100 + number)
    with DataFile(tmp_path / DATA) as data:
        graph = FourBitBuilder(model, None, data).build()
    onnx.save(graph, tmp_path / FUSED)
    tensors = stored(tmp_path / FUSED)
    attention = model.model.layers[1].self_attn
    expected = torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias]).numpy()
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.qkv.bias"], expected)
    (add,) = [n for n in graph.graph.node if n.op_type == "Add" and n.input[0] == "model.layers.1.self_attn.qkv"]
    (reader,) = [n for n in graph.graph.node if add.output[0] in n.input]
    assert reader.op_type == "GroupQueryAttention"


def operators(path: Path) -> tuple[onnx.ModelProto, dict[tuple[str, str], int]]:
    graph = onnx.load(path, load_external_data=False)
    found: dict[tuple[str, str], int] = {}
    for node in graph.graph.node:
        found[node.domain, node.op_type] = found.get((node.domain, node.op_type), 0) + 1
    return graph, found


@pytest.mark.parametrize("head_bits", [0, 4, 8])
def test_the_baseline_has_nothing_of_ours_and_ours_its_calls(head_bits, tmp_path):
    ours, baseline = write_models(shape(), tmp_path, Options(head_bits=head_bits))
    graph, kinds = operators(baseline.folder / FUSED)
    assert not [domain for domain, _ in kinds if domain == "lit_binq"]
    assert len(graph.functions) == 0
    assert sorted(opset.domain for opset in graph.opset_import) == ["", "com.microsoft"]
    # qkv, o, gate, up and down of each block, and a rounded head
    assert kinds["com.microsoft", "MatMulNBits"] == 2 * 5 + (head_bits > 0)
    assert kinds["com.microsoft", "GroupQueryAttention"] == 2
    assert kinds["com.microsoft", "SkipSimplifiedLayerNormalization"] == 4
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits":
            assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
            assert len(node.input) == 3  # no zero points
    _, kinds = operators(ours.folder / FUSED)
    linears = {k: n for (domain, k), n in kinds.items() if domain == "lit_binq" and "Binary" in k}
    assert sum(linears.values()) == 2 * 3  # q/k/v, o, MLP
    assert sum(n for k, n in linears.items() if k.endswith("QKV")) == 2
    assert sum(n for k, n in linears.items() if k.endswith("GatedMLP")) == 2
    assert read_facts(ours.folder)["packed_nodes"] == 2 * 7
    assert read_facts(baseline.folder)["packed_nodes"] == 0


def test_bits_on_disk_are_what_the_shape_says(tmp_path):
    made = shape(hidden_size=256, intermediate_size=512)
    ours, baseline = write_models(made, tmp_path, Options(head_bits=4, block=32))
    # q, k, v, o, gate, up, down: rows N and columns K
    linears = [(64, 256), (32, 256), (32, 256), (256, 64), (512, 256), (512, 256), (256, 512)]
    weights = 2 * sum(N * K for N, K in linears)
    one = 2 * sum(N * K // 8 + 2 * (N + K) for N, K in linears)
    four = 2 * sum(N * K // 2 + 4 * N * K // 32 for N, K in linears)
    assert (ours.true_bits, baseline.true_bits) == (8 * one / weights, 5.0)
    head = 260 * (256 // 2 + 4 * 8)
    assert (ours.weight_bytes, baseline.weight_bytes) == (one + head + 260 * 4, four + head)  # ours has zero points
    embedding, angles, norms = 260 * (256 + 4 * 8), 2 * 512 * 8 * 4, 5 * 256 * 4
    for found, size in ((ours, one + head + 260 * 4), (baseline, four + head)):
        facts, file = read_facts(found.folder), (found.folder / DATA).stat().st_size
        assert facts["data_bytes"] == file
        # equal norms are stored once; every tensor begins at a multiple of 64
        assert size + embedding + angles <= file <= size + embedding + angles + norms + 64 * 70
        assert facts["true_bits"] == found.true_bits


def test_a_big_model_is_never_dense(tmp_path, monkeypatch):
    """What is made at a time is a linear's codes at most."""
    largest = 0
    original = DataFile.proto

    def watch(self: DataFile, name: str, array: np.ndarray) -> Any:
        nonlocal largest
        largest = max(largest, array.nbytes)
        return original(self, name, array)

    monkeypatch.setattr(DataFile, "proto", watch)
    made = shape(hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    write_models(made, tmp_path, Options())
    assert largest == 512 * 1024 // 2  # four bits of gate, up or down
