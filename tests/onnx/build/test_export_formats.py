"""Every format from torch through a packed folder to ONNX: the same bits, the same numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import byte_tokenizer
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import PreTrainedModel

from formats import VARIANTS, packed_variant, random_layer
from lit_binq.formats import FORMATS, OPERATORS, PackedLinear
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.bits import true_bits
from lit_binq.hub.save_load import WEIGHTS, load_packed, save_packed
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.functions import BODIES
from lit_binq_onnx.runtime.library import library_path
from lit_binq_onnx.runtime.session import MODEL, OnnxModel, positions, read_facts
from native import require_native

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@dataclass
class Stored:
    """A model saved, loaded again and exported."""

    model: PreTrainedModel
    loaded: PreTrainedModel
    packed: Path
    onnx: Path

    def layers(self) -> dict[str, PackedLinear]:
        return packed_linears(self.model)


@pytest.fixture(scope="module", params=["llama", "opt"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Every variant in one model: its three blocks have 18 linears or more. OPT has biases, LLaMA none."""
    folder = tmp_path_factory.mktemp("stored")
    model = packed_variant(request.param, "mixed")
    assert len(packed_linears(model)) >= len(VARIANTS)
    save_packed(model, byte_tokenizer(), folder / "packed", facts={})
    loaded, tokenizer = load_packed(folder / "packed")
    export_onnx(loaded, tokenizer, folder / "onnx", packed=folder / "packed", check=False)
    return Stored(model, loaded, folder / "packed", folder / "onnx")


def torch_logits(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=IDS).logits.numpy()


def onnx_logits(model: OnnxModel) -> np.ndarray:
    mask = np.ones(IDS.shape, np.int64)
    return model.forward(IDS.numpy(), mask, positions(mask), model.empty_past(len(IDS)))[0]


def test_every_format_is_tried() -> None:
    assert {variant.partition("-")[0] for variant in VARIANTS} == {k for k, f in FORMATS.items() if f.deployable}
    assert set(OPERATORS) == set(BODIES)


# --- packed folders


def test_reloaded_logits_are_bit_identical(stored: Stored) -> None:
    """save_packed rounds the rest of the model in place, so both compute with what is stored."""
    assert np.array_equal(torch_logits(stored.model), torch_logits(stored.loaded))
    for name, layer in stored.layers().items():
        again = stored.loaded.get_submodule(name)
        assert type(again) is type(layer)
        assert again.layout() == layer.layout()
        assert torch.equal(again.dequantize(), layer.dequantize())


def test_true_bits_are_the_stored_bytes(stored: Stored) -> None:
    """Of the file: whatever is stored under a packed linear's name, but its bias."""
    tensors = load_file(stored.packed / WEIGHTS)
    total = 0
    for name, layer in stored.layers().items():
        mine = {k: t for k, t in tensors.items() if k.startswith(f"{name}.") and not k.endswith(".bias")}
        assert layer.stored_bits() == 8 * sum(t.nbytes for t in mine.values())
        total += layer.stored_bits()
    weights = sum(m.in_features * m.out_features for m in stored.layers().values())
    assert true_bits(stored.loaded) == total / weights == read_facts(stored.onnx)["true_bits"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_compute_with_what_they_store(variant: str, bias: bool) -> None:
    layer = random_layer(variant, 27, 45, bias=bias)
    x = torch.randn(2, 3, 45, generator=torch.Generator().manual_seed(1))
    W, b = layer.dequantize().double(), None if layer.bias is None else layer.bias.double()
    expected = torch.nn.functional.linear(x.double(), W, b)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (layer.bias is not None) == bias
    empty = type(layer)(45, 27, bias, **layer.layout())
    empty.load_state_dict(layer.state_dict())
    empty.refresh()
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_latent_twins_compute_the_same(variant: str) -> None:
    layer = random_layer(variant, 27, 45, bias=True)
    x = torch.randn(4, 45, generator=torch.Generator().manual_seed(1))
    target = torch.randn(27, 45, generator=torch.Generator().manual_seed(2))
    for latent in (layer.latent(False), layer.latent(True), layer.latent(True, target)):
        torch.testing.assert_close(latent(x), layer(x), rtol=1e-4, atol=1e-4 * float(layer(x).abs().max()))
        assert torch.equal(latent.pack().dequantize(), layer.dequantize())


# --- ONNX


def test_stock_runtime_equals_torch(stored: Stored) -> None:
    expected = torch_logits(stored.loaded)
    assert np.abs(expected).max() > 0.1
    got = onnx_logits(OnnxModel(stored.onnx, native=False))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_native_operators_equal_torch(stored: Stored) -> None:
    """Exact to 1e-4, tables within their tolerance, and as many calls as the layers say."""
    library = require_native()
    expected = torch_logits(stored.loaded)
    calls = sum(len(m.operands()) for m in stored.layers().values())
    for mode in ("exact", "lut"):
        model = OnnxModel(stored.onnx, native=True, mode=mode, threads=1)
        before = library.calls()
        got = onnx_logits(model)
        assert library.calls() - before == calls
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < (1e-4 if mode == "exact" else 0.2)
        assert mode == "exact" or error > 1e-3  # the tables were used


def test_check_passes(stored: Stored) -> None:
    report = check_onnx(stored.onnx, stored.loaded, byte_tokenizer())
    assert len(report.cases) == (4 if library_path() is None else 10)


def test_nodes_hold_the_stored_tensors(stored: Stored) -> None:
    """Node by node, in the order of their inputs and with the attributes that the bodies name."""
    proto = onnx.load(stored.onnx / MODEL)
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    nodes = [n for n in proto.graph.node if n.domain == "lit_binq"]
    wanted = [call for m in stored.layers().values() for call in m.operands()]
    assert len(nodes) == len(wanted) == read_facts(stored.onnx)["packed_nodes"]
    for kind, operands in wanted:
        arrays = [t.numpy() for t in operands]
        assert any(
            n.op_type == kind
            and len(n.input) == 1 + len(arrays)
            and all(
                tensors[name].dtype == a.dtype and np.array_equal(tensors[name], a)
                for name, a in zip(n.input[1:], arrays, strict=True)
            )
            for n in nodes
        )
    used = {n.op_type for n in nodes}
    assert {f.name for f in proto.functions} == used
    for n in nodes:
        assert {a.name for a in n.attribute} == set(BODIES[n.op_type]().attribute)


def test_tampering_is_noticed(tmp_path: Path) -> None:
    """The second plane of one layer."""
    model = packed_variant("llama", "planes")
    export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.codes1[:] = 255 - layer.codes1
    with pytest.raises(Exception, match="differs from torch"):
        check_onnx(tmp_path / "out", model, byte_tokenizer())
