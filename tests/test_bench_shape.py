"""`bench shape`: both graphs compute what their weights say, bits are the shape's, and nothing is left behind."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import tiny_config
from native import require_native
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from lit_binq import cli
from lit_binq.bench_worker import WorkerFailed
from lit_binq.errors import LitBinqError
from lit_binq.packed_layers import packed_linears
from lit_binq_onnx import bench_generation as generation
from lit_binq_onnx import bench_shape as module
from lit_binq_onnx.bench_shape import FOLDERS, Options, bench_shape, write_models
from lit_binq_onnx.bench_table import shape_table
from lit_binq_onnx.four_bit import FourBitBuilder
from lit_binq_onnx.head import _values
from lit_binq_onnx.session import DATA, FUSED, OnnxModel, positions, read_facts
from lit_binq_onnx.shapes import BUILT_IN, LAYOUTS, Shape, random_model, random_tables, read_shape, weights_of
from lit_binq_onnx.tensors import DataFile

IDS = np.random.default_rng(3).integers(0, 260, (1, 9))


def config(kind: str = "llama", **others: Any) -> Any:
    """Width 64, MLP 96, heads of 16: what the fused route takes."""
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    options: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return kinds[kind](**options | others)


def shape(kind: str = "llama", **others: Any) -> Shape:
    return Shape("tiny", config(kind, **others), 2)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """With a config.json of a tiny shape."""
    config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


# --- shapes


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
    rival = random_tables(config(hidden_size=192), 4, block=128, symmetric=True)
    assert rival is not None
    assert (rival.head.block, rival.head.zeros) == (64, None)  # 128 does not divide 192


# --- graphs


def unrounded(path: Path) -> None:
    """Let products read float32 activations: rounding to int8 would hide what is wrong."""
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(graph, path)


def run(folder: Path, *, parts: tuple[int, ...] = (5, 8, 9)) -> np.ndarray:
    """Logits of IDS without our library, in several passes."""
    model = OnnxModel(folder, native=False, route="fused", threads=1)
    cache, found, start = model.empty_past(1, 16), [], 0
    for stop in parts:
        mask = np.ones((1, stop), np.int64)
        logits, cache = model.forward(IDS[:, start:stop], mask, positions(mask)[:, start:], cache)
        found.append(logits)
        start = stop
    return np.concatenate(found, 1)[0]


def stored(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name: _values(tensor, path.parent) for tensor in graph.initializer}


def four_bit_weight(tensors: dict[str, np.ndarray], name: str, K: int) -> np.ndarray:
    """(N, K) float64 of symmetric 4-bit codes, two to a byte, the first in the low half."""
    codes = tensors[f"{name}.codes"]
    q = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float64) - 8
    W = q * tensors[f"{name}.scales"].astype(np.float64).reshape(*codes.shape[:2], 1)
    return W.reshape(len(codes), -1)[:, :K]


def rival_in_torch(folder: Path, made: Any) -> PreTrainedModel:
    """A dense torch model of what the rival's graph stores; dense tables."""
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
def test_the_rival_computes_what_it_stores(kind, block, tmp_path, monkeypatch):
    made = shape(kind)
    options = Options(head_bits=0, block=block)
    _, rival = write_models(made, tmp_path, options)
    unrounded(rival.folder / FUSED)
    with torch.no_grad():
        expected = rival_in_torch(rival.folder, made.config)(torch.from_numpy(IDS)).logits[0].numpy()
    got = run(rival.folder)
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
def test_the_rival_has_nothing_of_ours_and_ours_its_calls(head_bits, tmp_path):
    ours, rival = write_models(shape(), tmp_path, Options(head_bits=head_bits))
    graph, kinds = operators(rival.folder / FUSED)
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
    assert sum(linears.values()) >= 2 * 3
    assert sum(n for k, n in linears.items() if k.endswith("QKV")) == 2
    assert sum(n for k, n in linears.items() if k.endswith("GatedMLP")) == 2
    assert read_facts(ours.folder)["packed_nodes"] >= 6
    assert read_facts(rival.folder)["packed_nodes"] == 0


def test_bits_on_disk_are_what_the_shape_says(tmp_path):
    made = shape(hidden_size=256, intermediate_size=512)
    ours, rival = write_models(made, tmp_path, Options(head_bits=4, block=32))
    # q, k, v, o, gate, up, down: rows N and columns K
    linears = [(64, 256), (32, 256), (32, 256), (256, 64), (512, 256), (512, 256), (256, 512)]
    weights = 2 * sum(N * K for N, K in linears)
    one = 2 * sum(N * K // 8 + 2 * (N + K) for N, K in linears)
    four = 2 * sum(N * K // 2 + 4 * N * K // 32 for N, K in linears)
    assert (ours.true_bits, rival.true_bits) == (8 * one / weights, 5.0)
    head = 260 * (256 // 2 + 4 * 8)
    assert (ours.weight_bytes, rival.weight_bytes) == (one + head + 260 * 4, four + head)  # ours has zero points
    embedding, angles, norms = 260 * (256 + 4 * 8), 2 * 512 * 8 * 4, 5 * 256 * 4
    for found, size in ((ours, one + head + 260 * 4), (rival, four + head)):
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


# --- the run


def test_bench_shape_end_to_end(folder, tmp_path, capsys):
    require_native()
    place, out = tmp_path / "place", tmp_path / "figures.json"
    options = ["--past", "9", "--tokens", "4", "--rounds", "2", "--folder", str(place), "--json", str(out)]
    assert cli.main(["bench", "shape", folder, "--layers", "1", *options]) == 0
    text = capsys.readouterr().out
    ours, rival = json.loads(out.read_text())
    assert [r["status"] for r in (ours, rival)] == ["measured"] * 2
    assert [r["kernel"] for r in (ours, rival)] == ["lit-binq, 1 bit", "ONNX Runtime, 4 bits, block 32"]
    assert (ours["ratio"], ours["blocks"], ours["full_blocks"]) == (1.0, 1, 2)
    assert (ours["context"], ours["burst"], ours["rounds"], ours["source"]) == (9, 4, 2, "")
    for r in (ours, rival):
        assert r["cache_bytes"] == 2 * 1 * 2 * 16 * 4 * (9 + 2)
        read = (r["weight_bytes"] + r["cache_bytes"]) * r["tokens_per_s"] / 1e9
        assert r["gbytes_per_s"] == pytest.approx(read)
        assert r["share_of_read"] == pytest.approx(read / r["read_gbytes_per_s"])
        assert r["file_bytes"] > r["weight_bytes"]
        assert f"| {r['kernel']} |" in text
    assert "tiny, 1 of its 2 blocks: medians of 2 alternating bursts, 4 tokens decoded after 9, 1 thread" in text
    assert list(place.iterdir()) == []


def test_kept_models_stay_are_replaced_and_open(folder, tmp_path, capsys):
    require_native()
    arguments = ["bench", "shape", folder, "--past", "5", "--tokens", "2", "--rounds", "1", "--head_bits", "8"]
    for _ in range(2):
        assert cli.main([*arguments, "--folder", str(tmp_path / "kept"), "--keep", "true"]) == 0
    assert [f.name for f in (tmp_path / "kept").iterdir()] == ["tiny"]
    assert sorted(f.name for f in (tmp_path / "kept" / "tiny").iterdir()) == sorted(FOLDERS)
    ours, _ = (tmp_path / "kept" / "tiny" / name for name in FOLDERS)
    assert np.isfinite(run(ours)).all()
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    assert cli.main([*arguments, "--folder", str(tmp_path / "mine"), "--keep", "true"]) == 1
    assert "not what this command wrote" in capsys.readouterr().err
    assert cli.main([*arguments, "--keep", "true"]) == 1
    assert "--folder FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--past", "0"], ["past", "0"]),
        (["--tokens", "0"], ["tokens", "0"]),
        (["--rounds", "0"], ["rounds", "0"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--block", "48"], ["block", "48", "128"]),
        (["--layers", "3"], ["layers", "3", "1 to the 2"]),
        (["--layers", "0"], ["layers", "0"]),
        (["--past", "500", "--tokens", "20"], ["500 + 20", "512 positions"]),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(arguments, words, folder, tmp_path, capsys):
    place = tmp_path / "place"
    assert cli.main(["bench", "shape", folder, "--folder", str(place), *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("litbinq bench: error: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not place.exists()


def test_models_that_do_not_fit_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))
    tiny_config("opt").save_pretrained(tmp_path / "opt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    config(hidden_size=72, head_dim=16).save_pretrained(tmp_path / "odd")
    place = tmp_path / "place"
    expected = {
        "nowhere": "expected one of llama-7b",
        str(tmp_path / "opt"): "OPTForCausalLM is none of",
        str(tmp_path / "broken"): "cannot be read",
        str(tmp_path / "odd"): "expected a multiple of 16",
    }
    for source, words in expected.items():
        assert cli.main(["bench", "shape", source, "--folder", str(place), "--past", "9"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert words in err
        assert not place.exists() or list(place.iterdir()) == []


@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_leaves_nothing_half_written(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FourBitBuilder, "_mlp", broken)
    with pytest.raises(LitBinqError, match=r"cannot be written \(No space left on device\).*--folder"):
        bench_shape(shape(), Options(), folder=str(tmp_path), keep=keep)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(FourBitBuilder, "_mlp", lambda *_: math.sqrt(-1))
    with pytest.raises(ValueError, match="math domain"):
        bench_shape(shape(), Options(), folder=str(tmp_path), keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_and_no_library_are_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: None)
    with pytest.raises(LitBinqError, match="library is missing"):
        bench_shape(shape(), Options(), folder=str(tmp_path))
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LitBinqError, match=r"0\.0 GB are free, expected 0\.1 for the models"):
        bench_shape(shape(), Options(), folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [Options(), Options("grouped", 8, 128), Options(head_bits=0, block=16)])
def test_the_room_that_is_asked_for_is_enough_and_not_twice_as_much(options, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_ROOM", 0)
    monkeypatch.setattr(module, "_require_room", lambda _, wanted: asked.append(wanted))
    write_models(shape(hidden_size=512, intermediate_size=1024, vocab_size=5000), tmp_path, options)
    size = sum((tmp_path / name / DATA).stat().st_size for name in FOLDERS)
    assert 0.97 * size < asked[0] < 1.3 * size


class Fake:
    """A process in which a token takes 1 s, or the rival's 3; it says what it was asked to open."""

    opened: list[Any] = []  # noqa: RUF012  # emptied by the test
    breaks = ""

    def __init__(self, setting: Any) -> None:
        if setting.engine == Fake.breaks:
            raise WorkerFailed("OSError: it is broken")
        Fake.opened.append(setting)
        self.engine = setting.engine
        self.started = {"import_seconds": 1.0, "load_seconds": 2.0, "rss": 100, "peak": 100, "anon": 50}

    def ask(self, **request: Any) -> dict[str, Any]:
        seconds = (request.get("steps") or 1) * (1.0 if self.engine == "native" else 3.0)
        return {"seconds": seconds, "rss": 300, "peak": 400, "anon": 200}

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))
    monkeypatch.setattr(generation, "Worker", Fake)
    monkeypatch.setattr(generation, "PAUSE", 0.0)
    monkeypatch.setattr(generation, "buffer_bytes", lambda cache: 1000)
    monkeypatch.setattr(Fake, "opened", [])
    monkeypatch.setattr(Fake, "breaks", "")
    return Fake


def test_records_say_what_was_timed(fake, tmp_path):
    ours, rival = bench_shape(shape(), Options(past=7, tokens=4, rounds=3, block=64), folder=str(tmp_path))
    # the rival's process loads nothing of ours
    assert [setting.engine for setting in fake.opened] == ["native", "stock"]
    assert [Path(setting.source).name for setting in fake.opened] == list(FOLDERS)
    assert (ours.tokens_per_s, rival.tokens_per_s, ours.ratio, rival.ratio) == (1.0, pytest.approx(1 / 3), 1.0, 3.0)
    assert (ours.format, rival.format, ours.shape, ours.head_bits) == ("row_column", "4 bits, block 64", "tiny", 4)
    assert rival.gbytes_per_s == pytest.approx((rival.weight_bytes + rival.cache_bytes) / 3e9)
    assert (rival.rss_loaded_bytes, rival.rss_bytes, rival.anon_bytes, rival.peak_bytes) == (100, 300, 200, 400)
    table = shape_table([ours, rival])
    assert "| ONNX Runtime, 4 bits, block 64 | 0.333 (0.333 to 0.333) | 3000 | 3.00 (3.00 to 3.00) | 4.8" in table
    assert all(len(line.split("|")) == 16 for line in table.splitlines() if line.startswith("|"))


def test_a_rival_that_fails_is_a_row_and_ours_an_error(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "breaks", "stock")
    records = bench_shape(shape(), Options(past=7, tokens=4, rounds=1), folder=str(tmp_path))
    assert (records[0].status, records[1].status) == ("measured", "failed")
    table = shape_table(records)
    assert "| failed: OSError: it is broken |" in table
    assert all(len(line.split("|")) == 16 for line in table.splitlines() if line.startswith("|"))
    monkeypatch.setattr(fake, "breaks", "native")
    with pytest.raises(LitBinqError, match="it is broken"):
        bench_shape(shape(), Options(past=7, tokens=4, rounds=1), folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_counted(tmp_path):
    weights, bits = weights_of(random_model(shape(), dense_tables=False))
    assert weights == 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96)
    assert 1 < bits / weights < 2
