"""The fused graph: torch's numbers in every kind of pass, in place, and never where it does not fit."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import byte_tokenizer
from transformers import DynamicCache, PreTrainedModel

import lit_binq_onnx.build.export as export_module
from exporting import FUSED_KINDS, fusable_model, packed_model
from formats import packed_variant, random_solution
from lit_binq.errors import LitBinqError
from lit_binq.formats import BinaryLinear
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.build.fused import build_fused, unfusable_reason
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.runtime.cache import StaticCache
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.session import DATA, FUSED, OnnxModel, cache_arrays, positions, read_facts
from native import require_native

IDS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(5)).numpy()


@dataclass
class Exported:
    model: PreTrainedModel
    folder: Path

    def open(self, **options: Any) -> OnnxModel:
        return OnnxModel(self.folder, native=False, route="fused", **options)

    @torch.no_grad()
    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.model(input_ids=torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="module", params=FUSED_KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("fused") / request.param
    model = fusable_model(request.param)
    facts = export_onnx(model, byte_tokenizer(), folder, check=False)
    assert facts["fused"]
    return Exported(model, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("fused") / "one"
    model = fusable_model("llama")
    export_onnx(model, byte_tokenizer(), folder, check=False)
    return Exported(model, folder)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def feed(model: OnnxModel, ids: np.ndarray, start: int, stop: int, cache: Any, **options: Any) -> np.ndarray:
    where = np.broadcast_to(np.arange(start, stop), (len(ids), stop - start))
    logits, after = model.forward(ids[:, start:stop], np.ones((len(ids), stop)), where, cache, **options)
    assert after is cache
    return logits


def test_prefill_decode_and_batches_equal_torch(exported: Exported) -> None:
    """A prompt in two parts, then one token at a time far beyond every window, in a cache that has to grow twice."""
    model = exported.open()
    for rows in (1, 3):
        ids, cache = IDS[:rows], StaticCache(model.cache_shapes, rows, 8)
        parts = [(0, 5), (5, 12), *((i, i + 1) for i in range(12, 40))]
        got = np.concatenate([feed(model, ids, a, b, cache) for a, b in parts], axis=1)
        close(got, exported.logits(ids))
        assert cache.length == 40


def test_native_operators_equal_torch(exported: Exported) -> None:
    library = require_native()
    model = OnnxModel(exported.folder, native=True, mode="exact", threads=1)
    assert model.route == "fused"
    before = library.calls()
    got = feed(model, IDS[:1], 0, 20, model.empty_past())
    attentions = exported.model.config.num_hidden_layers
    assert library.calls() - before == read_facts(exported.folder)["packed_nodes"] + attentions
    close(got, exported.logits(IDS[:1, :20]))
    lut = OnnxModel(exported.folder, native=True, mode="lut", threads=1)
    error = np.abs(feed(lut, IDS[:1], 0, 20, lut.empty_past()) - got).max() / np.abs(got).max()
    assert 1e-5 < error < 0.1


def test_rows_of_different_lengths(exported: Exported) -> None:
    """Prompts of 3, 9 and 6 tokens read together with padding after them, then each goes on by one token at a time."""
    model, lengths = exported.open(), np.array([3, 9, 6])
    cache = model.empty_past(3, 16)
    mask = np.arange(9) < lengths[:, None]
    logits, _ = model.forward(IDS[:, :9], mask, positions(mask), cache)
    expected = exported.logits(IDS[:, :15])
    for i, n in enumerate(lengths):
        close(logits[i, :n], expected[i, :n])
    for _ in range(5):
        new = np.take_along_axis(IDS, lengths[:, None], 1)
        lengths = lengths + 1
        mask = np.arange(lengths.max()) < lengths[:, None]
        logits, _ = model.forward(new, mask, lengths[:, None] - 1, cache)
        close(logits[:, 0], np.stack([expected[i, n - 1] for i, n in enumerate(lengths)]))


def test_only_the_last_logits(exported: Exported) -> None:
    model = exported.open()
    all_of_them = feed(model, IDS, 0, 10, model.empty_past(3))
    last = feed(model, IDS, 0, 10, model.empty_past(3), last_only=True)
    assert last.shape == (3, 1, 260)
    np.testing.assert_allclose(last, all_of_them[:, -1:], atol=1e-5)


def test_keys_and_values_equal_the_generic_route(exported: Exported) -> None:
    generic = OnnxModel(exported.folder, native=False, route="generic")
    where = np.broadcast_to(np.arange(7), (3, 7))
    _, growing = generic.forward(IDS[:, :7], np.ones((3, 7)), where, generic.empty_past(3))
    model = exported.open()
    cache = model.empty_past(3)
    feed(model, IDS, 0, 7, cache)
    for mine, theirs in zip(cache_arrays(cache), cache_arrays(growing), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_padding_on_the_left_takes_the_generic_route(llama: Exported, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lit_binq_onnx")
    model = OnnxModel(llama.folder, native=False)
    ids, mask = IDS[:1, :6], np.array([[0, 0, 1, 1, 1, 1]])
    logits, cache = model.forward(ids, mask, positions(mask), model.empty_past())
    close(logits[:, 2:], llama.logits(ids[:, 2:]))
    assert "padding on the left" in caplog.text
    mask = np.append(mask, [[1]], 1)
    logits, _ = model.forward(IDS[:1, 6:7], mask, np.array([[4]]), cache)
    close(logits, llama.logits(IDS[:1, 2:7])[:, -1:])


def test_a_cache_does_not_change_its_kind_in_mid_text(llama: Exported) -> None:
    model = llama.open()
    cache = model.empty_past()
    feed(model, IDS[:1], 0, 4, cache)
    for mask, where in ((np.array([[0, 1, 1, 1, 1]]), 3), (np.ones((1, 5)), 7), (np.ones((1, 7)), 6)):
        with pytest.raises(RunError, match="fused route: got rows of"):
            model.forward(IDS[:1, 4:5], mask, np.array([[where]]), cache)
    assert cache.length == 4


def test_positions_end(llama: Exported) -> None:
    model = llama.open()
    ids = np.zeros((1, 129), np.int64)
    with pytest.raises(RunError, match="got 129 tokens, expected at most the model's 128"):
        feed(model, ids, 0, 129, model.empty_past())


def test_no_pass_copies_the_cache(llama: Exported) -> None:
    model = llama.open()
    cache = model.empty_past(1, 32)
    assert isinstance(cache, StaticCache)
    memory = [buffer.ctypes.data for buffer in cache._buffers]
    for i in range(20):
        feed(model, IDS[:1], i, i + 1, cache)
    assert [buffer.ctypes.data for buffer in cache._buffers] == memory
    assert all(np.abs(buffer[:, :, 19]).max() > 0 for buffer in cache._buffers)
    assert all(np.abs(buffer[:, :, 20:]).max() == 0 for buffer in cache._buffers)


def test_both_graphs_share_one_data_file(exported: Exported) -> None:
    assert {f.name for f in exported.folder.iterdir() if ".onnx" in f.name} == {"model.onnx", DATA, FUSED}
    proto = onnx.load(exported.folder / FUSED, load_external_data=False)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("CachedAttention") == 2
    normalized = exported.model.config.model_type == "qwen3"
    assert kinds.count("SkipSimplifiedLayerNormalization") == (2 if normalized else 1)
    assert kinds.count("SimplifiedLayerNormalization") == (5 if normalized else 0)  # of heads, and the first block's
    stored = sum(t.nbytes for t in exported.model.state_dict().values())
    angles = 4 * 128 * 16
    # written twice, the packed weights and tables would double it
    assert (exported.folder / DATA).stat().st_size < stored + angles + 8192


def operators(model: PreTrainedModel, folder: Path) -> Counter[str]:
    """How often each operator of ours is in the fused graph of a model."""
    with DataFile(folder / "data") as data:
        graph = build_fused(model, None, data).graph
    return Counter(node.op_type for node in graph.node if node.domain == "lit_binq")


def test_linears_that_share_an_input_are_one_node(exported: Exported, tmp_path: Path) -> None:
    """Per block: q, k and v one node unless heads are normalized between them and attention; the MLP one node."""
    normalized = exported.model.config.model_type == "qwen3"
    attention = {"BinaryMatMul": 8} if normalized else {"BinaryMatMul": 2, "NormBinaryMatMulQKV": 2}
    assert operators(exported.model, tmp_path) == attention | {"NormBinaryGatedMLP": 2, "CachedAttention": 2}
    proto = onnx.load(exported.folder / FUSED, load_external_data=False)
    assert not {node.op_type for node in proto.graph.node} & {"Sigmoid", "Mul"}
    attentions = [node for node in proto.graph.node if node.op_type == "CachedAttention"]
    assert all(len(node.input) == (9 if normalized else 7) for node in attentions)


def test_one_linear_that_does_not_fit_keeps_nodes_apart(tmp_path: Path) -> None:
    """A bias in an MLP, another format in an attention: only where they are, and logits stay torch's.

    A bias of one of q, k and v is no such thing.
    """
    model = fusable_model("llama")
    for name in ("q_proj", "k_proj"):
        layer = model.model.layers[0].self_attn.get_submodule(name)
        biased = BinaryLinear.from_solution(layer.solution(), torch.linspace(-1, 1, layer.out_features))
        model.model.layers[0].self_attn.set_submodule(name, biased)
    up, k = model.model.layers[0].mlp.up_proj, model.model.layers[1].self_attn.k_proj
    model.model.layers[0].mlp.up_proj = BinaryLinear.from_solution(up.solution(), torch.ones(up.out_features))
    model.model.layers[1].self_attn.k_proj = random_solution(
        "grouped-8", k.dequantize(), torch.Generator().manual_seed(0)
    ).pack()
    assert operators(model, tmp_path) == {
        "NormBinaryMatMulQKV": 1,
        "NormBinaryGatedMLP": 1,
        "BinaryMatMul": 2 + 2 + 3,
        "GroupedBinaryMatMul": 1,
        "CachedAttention": 2,
    }
    facts = export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)
    assert facts["fused"]
    mixed = Exported(model, tmp_path / "out")
    session = mixed.open()
    close(feed(session, IDS, 0, 12, session.empty_past(3)), mixed.logits(IDS[:, :12]))


def test_the_native_session_runs_the_fused_operators(exported: Exported, tmp_path: Path) -> None:
    """Function bodies would give the same numbers, one BinaryMatMul after the other: nothing else would show it."""
    library = require_native()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.path))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(exported.folder / FUSED, options, providers=["CPUExecutionProvider"])
    proto = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    assert Counter(n.op_type for n in proto.graph.node if n.domain == "lit_binq") == operators(exported.model, tmp_path)


@pytest.mark.parametrize("variant", ["mixed"])
def test_every_format_has_a_fused_form(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 8 do not run in CachedAttention, so the linears are compared one by one."""
    from onnx import TensorProto, helper

    from lit_binq.hub.save_load import packed_linears
    from lit_binq_onnx.build.writer import GraphWriter

    for number, (name, layer) in enumerate(packed_linears(packed_variant("llama", variant)).items()):
        path = tmp_path / f"{number}.onnx"
        with DataFile(path.with_suffix(".data")) as data:
            writer = GraphWriter(data)
            y = writer.linear(layer, "x", name)
            info = helper.make_tensor_value_info
            sizes = [info(n, TensorProto.FLOAT, ["m", k]) for n, k in (("x", layer.in_features), (y, None))]
            onnx.save(writer.model(sizes[:1], sizes[1:]), path)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(number))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            close(session.run(None, {"x": x.numpy()})[0], layer(x).numpy())


# --- where it does not fit


def test_other_models_keep_the_traced_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lit_binq_onnx")
    assert not export_onnx(packed_model("opt"), byte_tokenizer(), tmp_path / "opt", check=False)["fused"]
    assert "no fused graph (OPTForCausalLM is none of" in caplog.text
    assert not (tmp_path / "opt" / FUSED).exists()
    assert OnnxModel(tmp_path / "opt", native=False).route == "generic"
    with pytest.raises(RunError, match=r"no model_fused.onnx in it.*--fused auto"):
        OnnxModel(tmp_path / "opt", route="fused")


def test_what_the_fused_graph_refuses() -> None:
    assert unfusable_reason(fusable_model("llama")) is None
    for change, reason in (
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary embedding 'dynamic'"),
    ):
        model = fusable_model("llama")
        for key, value in change.items():
            setattr(model.config, key, value)
        assert reason in str(unfusable_reason(model))
    assert "head_dim 8" in str(unfusable_reason(packed_model("llama")))
    model = fusable_model("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    assert unfusable_reason(model) == "block 1: mlp.up_proj is not packed"


@pytest.mark.parametrize("attribute", ["scale", "local_window_size", "epsilon"])
def test_a_graph_with_other_logits_is_left_out(
    attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The comparison at export is what makes the route safe, so it must see a single wrong attribute."""

    def wrong(*arguments: Any) -> onnx.ModelProto:
        proto = build_fused(*arguments)
        for node in proto.graph.node:
            for a in node.attribute:
                if a.name == attribute:
                    a.f, a.i = a.f * 1.1 + 0.01, {"local_window_size": 3}.get(attribute, 1)
        return proto

    monkeypatch.setattr(export_module, "build_fused", wrong)
    facts = export_onnx(fusable_model("llama"), byte_tokenizer(), tmp_path / "out", check=True)
    assert "the fused graph is left out" in caplog.text
    assert not facts["fused"]
    assert not read_facts(tmp_path / "out")["fused"]
    assert not (tmp_path / "out" / FUSED).exists()
    assert OnnxModel(tmp_path / "out", native=False).route == "generic"


def test_fused_off(tmp_path: Path) -> None:
    model = fusable_model("qwen3")
    assert not export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False, fused="off")["fused"]
    assert not (tmp_path / "out" / FUSED).exists()
    with pytest.raises(LitBinqError, match="fused: got 'on'"):
        export_onnx(model, byte_tokenizer(), tmp_path / "out", fused="on")  # type: ignore[arg-type]  # the point


def test_a_damaged_fused_graph_fails_the_check(llama: Exported, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    proto = onnx.load(copy / FUSED, load_external_data=False)
    next(a for n in proto.graph.node for a in n.attribute if a.name == "scale").f *= 1.5
    onnx.save(proto, copy / FUSED)
    with pytest.raises(LitBinqError, match=r"check: fused prefill \("):
        check_onnx(copy, llama.model)


def test_torch_cache_is_the_reference() -> None:
    """Sliding windows in torch follow the same rule with a cache as without: the reference of this file is sound."""
    model = fusable_model("mistral")
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=torch.from_numpy(IDS[:1])).logits
        parts = [
            model(input_ids=torch.from_numpy(IDS[:1, i : i + 1]), past_key_values=cache, use_cache=True).logits
            for i in range(20)
        ]
    close(torch.cat(parts, 1).numpy(), whole[:, :20].numpy())
