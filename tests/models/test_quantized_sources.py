"""Checkpoints that are quantized already: FP8 is widened, other methods are refused before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitting import fit
from lit_binq.errors import LitBinqError
from lit_binq.hub.save_load import load_packed
from lit_binq.models.load import load_model

BLOCK = 16


def state(folder: Path, **entries: Any) -> None:
    """Write a quantization method into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": entries}))


def to_fp8(folder: Path) -> dict[str, Tensor]:
    """Make an FP8 checkpoint of a dense one; returns what its weights stand for, multiplied out."""
    tensors, stored, dense = load_file(folder / "model.safetensors"), {}, {}
    for name, w in tensors.items():
        if ".layers." not in name or w.dim() != 2:
            stored[name] = w.bfloat16()
            dense[name] = stored[name].float()
            continue
        blocks = w.reshape(w.shape[0] // BLOCK, BLOCK, w.shape[1] // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        stored[name], stored[f"{name}_scale_inv"] = (w / wide).to(torch.float8_e4m3fn), scale
        dense[name] = stored[name].float() * wide
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    state(folder, quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[BLOCK, BLOCK])
    return dense


def test_fp8_is_widened_and_fitted(make_source: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    source = make_source("llama")
    dense = to_fp8(source)
    model = load_model(str(source))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    parameters = dict(model.named_parameters())
    for name, expected in dense.items():
        if name in parameters:
            # transformers multiplies out to bfloat16 at the least
            torch.testing.assert_close(parameters[name], expected, rtol=2**-8, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    fit(source, text_file, tmp_path / "packed")
    assert torch.isfinite(load_packed(tmp_path / "packed")[0](input_ids=torch.arange(8).reshape(1, -1)).logits).all()


@pytest.mark.parametrize(
    "entries",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "something new"},
    ],
)
def test_other_methods_are_refused_from_the_configuration(
    entries: dict[str, Any], make_source: Callable[..., Path]
) -> None:
    source = make_source("llama")
    (source / "model.safetensors").unlink()  # nothing is read of it
    state(source, **entries)
    with pytest.raises(LitBinqError, match="its weights are quantized already") as caught:
        load_model(str(source))
    assert entries["quant_method"] in str(caught.value)
    assert "\n" not in str(caught.value)
