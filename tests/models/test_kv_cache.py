"""Keys and values at four bits: against their definition, in every architecture, in fits, folders and exports."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from exporting import packed_model, random_model
from fitting import Remember, fit
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.blocks import find_blocks
from lit_binq.models.kv_cache import kv_bits, quantize_heads, require_kv, set_kv_bits
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.session import OnnxModel, positions

IDS = torch.arange(24).reshape(2, 12)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(input_ids=ids).logits
    return result


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    set_kv_bits(other, 4)
    return other


def test_sixteen_levels_for_every_token_and_head() -> None:
    t = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)) * 100
    t[0, 0, 0] = 0.0
    t[0, 0, 1] = -7.5
    got = quantize_heads(t)
    for row, expected in zip(got.reshape(-1, 64), t.reshape(-1, 64), strict=True):
        assert len(row.unique()) <= 16
        lo, step = expected.min(), (expected.max() - expected.min()) / 15
        codes = torch.round((expected - lo) / step) if step > 0 else torch.zeros(64)
        assert torch.equal(row, lo + step * codes)
        assert bool(((row - expected).abs() <= step / 2 * 1.0001).all())
    assert torch.equal(got[0, 0, :2], t[0, 0, :2])
    # A token's codes depend on nothing but the token: read late is as quantized early.
    assert torch.equal(quantize_heads(t[:, :, 2:4]), got[:, :, 2:4])


def test_gradient_passes_on_and_dtype_stays() -> None:
    t = torch.randn(1, 2, 3, 8).requires_grad_()
    weights = torch.randn(1, 2, 3, 8)
    (quantize_heads(t) * weights).sum().backward()
    assert t.grad is not None
    assert torch.equal(t.grad, weights)
    assert torch.equal(quantize_heads(t), quantize_heads(t.detach()))
    assert quantize_heads(t.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2", "qwen3"])
def test_every_architecture(kind: str, attention: str) -> None:
    """Whole windows and windows in two parts through the cache agree; off again, nothing is left of it."""
    model = random_model(kind)
    model.set_attn_implementation(attention)
    plain = logits(model)
    other = quantized(model)
    assert (kv_bits(model), kv_bits(other)) == (0, 4)
    require_kv(other, find_blocks(other), IDS[:1])
    whole = logits(other)
    assert 1e-3 < float((whole - plain).norm() / plain.norm()) < 0.5
    with torch.no_grad():
        first = other(input_ids=IDS[:, :7], use_cache=True)
        then = other(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(then.logits, whole[:, 7:], rtol=1e-4, atol=1e-4)
    set_kv_bits(other, 0)
    assert torch.equal(logits(other), plain)
    assert other.config._attn_implementation == attention


@torch.no_grad()
def test_keys_are_rounded_behind_the_rotary_embedding() -> None:
    """The first block attends to rounded copies of what the cache holds, which is what the plain model's holds."""
    model = random_model("llama")
    other, queries, attended = quantized(model), [], []

    def note(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query)
        return functions["sdpa"](module, query, *args, **kwargs)

    functions = AttentionInterface()
    functions.register("noting", note)
    model.config._attn_implementation = "noting"
    raw = model(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    projection = other.get_submodule("model.layers.0.self_attn.o_proj")
    projection.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    kept = other(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    assert torch.equal(kept.keys, raw.keys)
    groups = queries[0].shape[1] // raw.keys.shape[1]
    keys, values = (quantize_heads(t).repeat_interleave(groups, 1) for t in (raw.keys, raw.values))
    expected = nn.functional.scaled_dot_product_attention(queries[0], keys, values, is_causal=True)
    torch.testing.assert_close(attended[0], expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


def test_a_block_outside_the_interface_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> None:
            return None

    with pytest.raises(LitBinqError, match=r"block 0 of Own does not attend through .*: set kv_bits: 0"):
        require_kv(Own(), nn.ModuleList([nn.Linear(2, 2)]), IDS)


def test_other_bits_are_refused() -> None:
    with pytest.raises(LitBinqError, match="kv_bits: got 3, expected one of 0, 4"):
        set_kv_bits(tiny_model("llama"), 3)


def test_the_teacher_is_left_alone() -> None:
    model = tiny_model("llama")
    before = logits(model)
    windows = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))
    work = Workspace(model, windows, 2, torch.device("cpu"), StreamOptions(), torch.float32, kv_bits=4)
    assert kv_bits(work.student) == 4
    assert kv_bits(work.new_block(1)) == 4
    assert kv_bits(work.teacher) == 0
    assert all(kv_bits(block) == 0 for block in work.teacher_blocks)
    assert torch.equal(logits(work.teacher), before)


def test_a_packed_folder_remembers(tmp_path: Path) -> None:
    model = quantized(packed_model("llama"))
    save_packed(model, byte_tokenizer(), tmp_path / "packed", facts={})
    again, _ = load_packed(tmp_path / "packed")
    assert kv_bits(again) == 4
    assert torch.equal(logits(again), logits(model))
    assert "kv4" not in (tmp_path / "packed" / "config.json").read_text()
    path = tmp_path / "packed" / "lit_binq.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "kv_bits"}))  # as older folders are
    assert kv_bits(load_packed(tmp_path / "packed")[0]) == 0
    path.write_text(json.dumps(manifest | {"kv_bits": 3}))
    with pytest.raises(LitBinqError, match="asks for kv_bits 3, expected one of 0, 4"):
        load_packed(tmp_path / "packed")


def test_a_fit_with_four_bits(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Streams, tuning and what is reloaded see the same: logits agree bit for bit, and the option matters."""
    remember = Remember()
    fit(model_folder, text_file, tmp_path / "four", callbacks=[remember], kv_bits=4)
    fit(model_folder, text_file, tmp_path / "full")
    model, _ = load_packed(tmp_path / "four")
    ids = torch.arange(24).reshape(1, -1)
    assert kv_bits(model) == 4
    assert torch.equal(logits(model, ids), remember.logits)
    set_kv_bits(model, 0)
    assert not torch.equal(logits(model, ids), remember.logits)
    assert not torch.equal(logits(model, ids), logits(load_packed(tmp_path / "full")[0], ids))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_exported_graphs_quantize_too(kind: str, tmp_path: Path) -> None:
    """In standard operators; a step through the cache agrees with torch as a whole window does."""
    model = quantized(packed_model(kind))
    export_onnx(model, byte_tokenizer(), tmp_path / "onnx", check=False)
    onnx = OnnxModel(tmp_path / "onnx", native=False)
    mask = np.ones(IDS.shape, np.int64)
    got = onnx.forward(IDS.numpy(), mask, positions(mask), onnx.empty_past(len(IDS)))[0]
    expected = logits(model).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    set_kv_bits(model, 0)
    assert np.abs(got - logits(model).numpy()).max() > 1e-2 * np.abs(expected).max()
