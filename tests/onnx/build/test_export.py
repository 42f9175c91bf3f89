"""Exported folders: the same numbers as torch, every bit in its place, plain words for bad input."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from onnx import TensorProto, numpy_helper
from transformers import PreTrainedModel

import lit_binq_onnx.build.export as export_module
import lit_binq_onnx.runtime.session as session_module
from exporting import KINDS, export, packed_model
from lit_binq.errors import LitBinqError
from lit_binq.formats import BinaryLinear
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.build.graph import require_packed_nodes, store_half
from lit_binq_onnx.build.tensors import EXTERNAL_BYTES
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.library import library_path
from lit_binq_onnx.runtime.session import DATA, FACTS, MODEL, OnnxModel, positions, read_facts
from native import require_native


@dataclass
class Exported:
    model: PreTrainedModel
    folder: Path

    def layers(self) -> dict[str, BinaryLinear]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, BinaryLinear)}


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("export") / request.param
    return Exported(export(request.param, folder), folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("export") / "llama"
    return Exported(export("llama", folder), folder)


@pytest.fixture
def copy(llama: Exported, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def run(onnx_model: OnnxModel, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits (b, s, V) of one pass without a cache."""
    mask = np.ones_like(ids) if mask is None else mask
    return onnx_model.forward(ids, mask, positions(mask), onnx_model.empty_past(len(ids)))[0]


# --- the same numbers


def test_logits_equal_torch(exported: Exported) -> None:
    ids = torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exported.model(input_ids=ids).logits.numpy()
    got = run(OnnxModel(exported.folder, native=False), ids.numpy())
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_check_passes_every_case(exported: Exported) -> None:
    report = check_onnx(exported.folder, exported.model, byte_tokenizer())
    ways = ["unmodified"] if library_path() is None else ["exact", "lut", "unmodified"]
    cases, length = ("prefill", "decode", "left-padded"), "long beside short"
    wanted = [(way, case) for way in ways for case in (*cases, *((length,) if way == ways[0] else ()))]
    if read_facts(exported.folder)["fused"]:
        for way in ways[:2]:
            own = ("prefill", "decode", "batch", *((length,) if way == ways[0] else ()))
            wanted += [(way, f"fused {case}") for case in own]
    assert [(c.variant, c.case) for c in report.cases] == wanted
    assert all(c.passed for c in report.cases)
    told = [note for note in report.notes if note.startswith("lut: ")]
    assert len(told) == (library_path() is not None)
    table = str(report).splitlines()
    assert len(table) == 1 + len(report.cases) + len(report.notes)


def test_padding_on_the_left_changes_nothing(exported: Exported) -> None:
    onnx_model = OnnxModel(exported.folder, native=False)
    ids = np.array([[10, 20, 30, 40]])
    padded, mask = np.concatenate([np.full((1, 3), 258), ids], 1), np.array([[0, 0, 0, 1, 1, 1, 1]])
    np.testing.assert_allclose(run(onnx_model, padded, mask)[:, 3:], run(onnx_model, ids), atol=1e-4)


def test_native_operators_run_once_a_linear(exported: Exported) -> None:
    library = require_native()
    ids = np.array([[1, 2, 3]])
    for mode in ("exact", "lut"):
        onnx_model = OnnxModel(exported.folder, native=True, mode=mode, threads=1)
        before = library.calls()
        run(onnx_model, ids)
        attentions = exported.model.config.num_hidden_layers if onnx_model.route == "fused" else 0
        assert library.calls() - before == len(exported.layers()) + attentions
    unmodified = OnnxModel(exported.folder, native=False)
    before = library.calls()
    run(unmodified, ids)
    assert library.calls() == before


def test_modes_are_what_they_say(llama: Exported) -> None:
    require_native()
    ids = np.array([[1, 2, 3, 4, 5]])
    unmodified = run(OnnxModel(llama.folder, native=False), ids)
    exact, lut = (run(OnnxModel(llama.folder, native=True, mode=mode), ids) for mode in ("exact", "lut"))
    assert np.abs(exact - unmodified).max() < 1e-5 * np.abs(unmodified).max()
    assert 1e-4 < np.abs(lut - unmodified).max() / np.abs(unmodified).max() < 0.1


def test_tokens_unknown_to_the_model(llama: Exported) -> None:
    with pytest.raises(RunError, match=r"ONNX Runtime failed on input_ids \(1, 1\)"):
        run(OnnxModel(llama.folder, native=False), np.array([[9999]]))


# --- what is in the file


def test_every_linear_is_one_node_with_its_own_bits(exported: Exported) -> None:
    proto = onnx.load(exported.folder / MODEL)
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    nodes = [n for n in proto.graph.node if n.op_type == "BinaryMatMul"]
    layers = exported.layers()
    assert len(nodes) == len(layers) == read_facts(exported.folder)["packed_nodes"]
    for node in nodes:
        codes, *rest = (tensors[name] for name in node.input[1:])
        layer = next(m for m in layers.values() if np.array_equal(m.codes.numpy(), codes))
        assert codes.dtype == np.uint8
        assert [a.dtype for a in rest] == [np.float16, np.float16] + [np.float32] * (layer.bias is not None)
        np.testing.assert_array_equal(rest[0], layer.row_scale.numpy())
        np.testing.assert_array_equal(rest[1], layer.col_scale.numpy())
        if layer.bias is not None:
            np.testing.assert_array_equal(rest[2], layer.bias.numpy())
        assert [(a.name, a.i) for a in node.attribute] == [("K", layer.in_features)]


def test_layout_of_the_file(exported: Exported) -> None:
    proto = onnx.load(exported.folder / MODEL, load_external_data=False)
    assert {(f.domain, f.name) for f in proto.functions} == {("lit_binq", "BinaryMatMul")}
    assert {o.domain: o.version for o in proto.opset_import} == {"": 18, "lit_binq": 1}
    inline = [t for t in proto.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert all(numpy_helper.to_array(t).nbytes <= EXTERNAL_BYTES for t in inline)
    names = [i.name for i in proto.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    assert dims["input_ids"] == ["batch", "sequence"]
    assert dims["attention_mask"] == ["batch", "past + sequence"]
    past = dims["past_key_values.1.value"]
    assert (past[0], past[2]) == ("batch", "past")
    assert {"config.json", "tokenizer.json", FACTS} <= {f.name for f in exported.folder.iterdir()}


def test_data_file_holds_every_tensor_once(exported: Exported) -> None:
    # equal tensors (norms that are all ones) may share their bytes as well as tied ones do
    distinct = {t.numpy().tobytes(): t.nbytes for t in exported.model.state_dict().values()}
    size = (exported.folder / DATA).stat().st_size
    # small tensors are in model.onnx; positions, masks and alignment may add a little
    small = sum(n for n in distinct.values() if n <= EXTERNAL_BYTES)
    config = exported.model.config
    angles = 4 * config.max_position_embeddings * config.head_dim if read_facts(exported.folder)["fused"] else 0
    assert sum(distinct.values()) - small <= size <= sum(distinct.values()) + angles + 4096


def test_facts(llama: Exported) -> None:
    facts = read_facts(llama.folder)
    layers = llama.layers().values()
    bits = sum(8 * t.nbytes for m in layers for t in (m.codes, m.row_scale, m.col_scale))
    assert facts["true_bits"] == bits / sum(m.in_features * m.out_features for m in layers)
    assert facts["data_bytes"] == (llama.folder / DATA).stat().st_size
    assert facts["max_positions"] == 128
    assert facts["packed"] is None


def test_half_storage_changes_no_value(llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_binq_onnx.build.graph.HALF_STORAGE_ELEMENTS", 4096)
    folder = Path(shutil.copytree(llama.folder, tmp_path / "half"))
    graph = ir.load(llama.folder / MODEL)
    assert store_half(graph.graph) == 0  # random float32 values do not fit float16: left alone
    table = next(v for v in graph.graph.initializers.values() if list(v.shape) == [260, 32])
    table.const_value = ir.tensor(table.const_value.numpy().astype(np.float16).astype(np.float32))
    results, sizes = [], []
    for expected in (0, 1):
        if expected:
            assert store_half(graph.graph) == 1
        ir.save(graph, folder / MODEL, external_data=DATA, size_threshold_bytes=EXTERNAL_BYTES)
        sizes.append((folder / DATA).stat().st_size)
        (folder / FACTS).write_text(json.dumps({**read_facts(llama.folder), "data_bytes": sizes[-1]}))
        results.append(run(OnnxModel(folder, native=False), np.array([[1, 2, 3]])))
    np.testing.assert_array_equal(*results)
    assert sizes[0] - sizes[1] == 260 * 32 * 2


@pytest.mark.parametrize(("domain", "stored"), [("", 1), ("lit_binq", 0), ("com.microsoft", 0)])
def test_what_packed_operators_read_stays_float32(domain: str, stored: int) -> None:
    """Scales of rounded tables fit float16, but the operators that read them take float32 and must find it."""
    full = np.ones((200, 200), np.float32)
    scales = ir.Value(name="scales", const_value=ir.tensor(full, name="scales"))
    node = ir.Node(domain, "Neg", [scales], num_outputs=1)
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[scales], name="one_node", opset_imports={"": 18})
    assert store_half(graph) == stored


def test_changed_bits_are_noticed(llama: Exported) -> None:
    graph = ir.load(llama.folder / MODEL)
    layers = llama.layers()
    require_packed_nodes(graph, layers)
    other = {n: m for n, m in packed_model("llama").named_modules() if isinstance(m, BinaryLinear)}
    name = "model.layers.1.mlp.up_proj"
    other[name].codes[0, 0] ^= 1
    with pytest.raises(LitBinqError, match=f"packed tensors of {name} were changed"):
        require_packed_nodes(graph, other)
    with pytest.raises(LitBinqError, match="13 packed linears with 13 operators became 14 nodes"):
        require_packed_nodes(graph, {n: m for n, m in layers.items() if n != name})


# --- checking again later


def flip_bits(folder: Path, layer: BinaryLinear) -> None:
    """Invert one layer's codes in the data file."""
    data, codes = (folder / DATA).read_bytes(), layer.codes.numpy()
    at = data.find(codes.tobytes())
    assert at >= 0
    (folder / DATA).write_bytes(data[:at] + (~codes).tobytes() + data[at + codes.nbytes :])


def test_check_names_the_failed_case(llama: Exported, copy: Path) -> None:
    flip_bits(copy, llama.layers()["model.layers.0.self_attn.q_proj"])
    with pytest.raises(
        LitBinqError, match=r"check: prefill \((exact|unmodified)\) differs from torch: max .* expected"
    ):
        check_onnx(copy, llama.model)


def test_check_finds_its_source(tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    save_packed(packed_model("llama"), byte_tokenizer(), packed, facts={})
    model, tokenizer = load_packed(packed)
    facts = export_onnx(model, tokenizer, out, packed=packed)
    assert facts["packed"] == "../packed"
    assert len(check_onnx(out).cases) in (4, 10)
    moved = packed.rename(tmp_path / "moved")
    with pytest.raises(LitBinqError, match=r"no such folder.*give `--packed`"):
        check_onnx(out)
    assert all(case.passed for case in check_onnx(out, packed=moved).cases)


def test_check_without_a_source(llama: Exported) -> None:
    with pytest.raises(LitBinqError, match="does not say which packed folder"):
        check_onnx(llama.folder)


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("opt")
    victim = model.get_submodule("model.decoder.layers.0.fc1")

    def tamper(folder: Path, *args: Any, **options: Any) -> object:
        flip_bits(folder, victim)
        return check_onnx(folder, *args, **options)

    monkeypatch.setattr(export_module, "check_onnx", tamper)
    out = tmp_path / "out"
    out.mkdir()
    (out / FACTS).write_text("an older export")
    with pytest.raises(LitBinqError, match="check: prefill"):
        export_onnx(model, byte_tokenizer(), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / FACTS).read_text() == "an older export"


# --- bad input


def test_refused_models(tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match="no packed linear"):
        export_onnx(tiny_model("llama"), byte_tokenizer(), tmp_path / "out")
    with pytest.raises(LitBinqError, match=r"is torch\.float16 on cpu, expected float32"):
        export_onnx(packed_model("llama").half(), byte_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refused_targets(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    model = packed_model("llama")
    with pytest.raises(LitBinqError, match="the folder holds other files"):
        export_onnx(model, byte_tokenizer(), tmp_path / "mine")
    with pytest.raises(LitBinqError, match="a file of this name exists"):
        export_onnx(model, byte_tokenizer(), tmp_path / "file")
    with pytest.raises(LitBinqError, match="cannot be written"):
        export_onnx(model, byte_tokenizer(), tmp_path / "file" / "out")


def test_models_that_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("llama")
    inner = model.model.forward

    def forward(input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        if input_ids.shape[1] > 1 and input_ids.sum().item() < 0:  # a branch on values
            raise AssertionError
        return inner(input_ids, *args, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    with pytest.raises(LitBinqError, match="torch cannot trace LlamaForCausalLM") as caught:
        export_onnx(model, byte_tokenizer(), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_models_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("llama")
    monkeypatch.setattr(model, "forward", lambda **_: SimpleNamespace(logits=None, past_key_values=None))
    with pytest.raises(LitBinqError, match="LlamaForCausalLM keeps no key-value cache"):
        export_onnx(model, byte_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _truncate(folder: Path) -> None:
    data = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (_remove(MODEL), "no model.onnx in it"),
        (_remove(FACTS), "not one of ours"),
        (_remove(DATA), r"model.onnx.data is missing, expected \d+ bytes"),
        (_truncate, r"is truncated to \d+ bytes, expected \d+"),
        (_write(FACTS, "{"), "is damaged"),
        (_write(FACTS, '{"version": 99, "data_bytes": 1}'), "version 99, expected 1"),
        (_write(MODEL, "no protobuf"), r"refuses model.onnx \("),
    ],
)
def test_damaged_folders(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(RunError, match=message) as caught:
        OnnxModel(copy, native=False)
    assert "\n" not in str(caught.value)


def test_bad_session_options(llama: Exported) -> None:
    with pytest.raises(RunError, match="mode: got 'fast'"):
        OnnxModel(llama.folder, mode="fast")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(RunError, match="threads: got -1"):
        OnnxModel(llama.folder, threads=-1)


def test_missing_library(llama: Exported, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("lit_binq_onnx.runtime.library.library_path", lambda: None)
    monkeypatch.setattr(session_module, "_warned", set())
    for _ in range(2):
        onnx_model = OnnxModel(llama.folder)
        assert (onnx_model.native, onnx_model.mode) == (False, "exact")
    assert caplog.text.count("running the function bodies on ONNX Runtime's own operators") == 1
    with pytest.raises(RunError, match="native operators: found no"):
        OnnxModel(llama.folder, native=True)
