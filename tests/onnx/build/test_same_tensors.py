"""An export holds the packed folder's own tensors, whatever model it was made with."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from exporting import fusable_model, pack_linears
from length_models import length_model
from lit_binq.errors import LitBinqError
from lit_binq.hub.save_load import WEIGHTS, load_packed, save_packed
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.build.same_tensors import require_same_tensors
from lit_binq_onnx.runtime.session import DATA


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """With a head of its own, as a merged adapter leaves it, large enough that nothing computes with it ahead."""
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(0.2 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(9)))
    return model


@pytest.mark.parametrize("head_bits", [0, 4, 8])
def test_a_head_that_was_lost_on_reload(head_bits: int, tmp_path: Path) -> None:
    """The reload ties a head that the folder holds apart: every comparison with that model would pass."""
    packed = tmp_path / "packed"
    save_packed(untied(fusable_model("llama")), byte_tokenizer(), packed, facts={})
    model, tokenizer = load_packed(packed)
    export_onnx(model, tokenizer, tmp_path / "right", packed=packed, head_bits=head_bits, check=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    options = {"head_bits": head_bits, "check": False}
    export_onnx(model, tokenizer, tmp_path / "unseen", **options)
    with pytest.raises(LitBinqError, match=r"lm_head\.weight"):
        export_onnx(model, tokenizer, tmp_path / "wrong", packed=packed, **options)
    assert not (tmp_path / "wrong").exists()


def test_every_tensor_is_found(tmp_path: Path) -> None:
    """Norms of which one is added (Gemma), biases and positions (OPT), tied and untied heads."""
    gemma, opt = length_model("gemma3"), pack_linears(tiny_model("opt"))
    for model, changed in ((gemma, "small ones are computed with ahead"), (opt, "")):
        packed, out = tmp_path / model.config.model_type, tmp_path / f"{model.config.model_type}-onnx"
        save_packed(model, byte_tokenizer(), packed, facts={})
        again, tokenizer = load_packed(packed)
        export_onnx(again, tokenizer, out, packed=packed, check=False)
        told = require_same_tensors(out, packed, again)
        assert told.startswith("tensors: ")
        assert told.endswith("are the packed folder's, byte for byte") or changed in told
        assert "never called" not in told


def test_changed_tensors_are_named(tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    save_packed(fusable_model("qwen2"), byte_tokenizer(), packed, facts={})
    model, tokenizer = load_packed(packed)
    export_onnx(model, tokenizer, out, packed=packed, check=False)
    assert "tensors: 14 packed linears and" in str(check_onnx(out))
    data = (out / DATA).read_bytes()
    table = load_file(packed / WEIGHTS)["model.embed_tokens.weight"].numpy().tobytes()
    at = data.index(table)
    (out / DATA).write_bytes(data[:at] + table[:100] + bytes([table[100] ^ 1]) + data[at + 101 :])
    with pytest.raises(LitBinqError, match=r"values of model\.embed_tokens\.weight"):
        check_onnx(out)
    (out / DATA).write_bytes(data)
    tensors = load_file(packed / WEIGHTS)
    for name in ("model.layers.1.mlp.up_proj.codes", "model.layers.0.self_attn.k_proj.bias"):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(torch.uint8).flatten()[0] ^= 1
        save_file(changed, packed / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(LitBinqError, match=name.rpartition(".")[0]):
            require_same_tensors(out, packed, model)
