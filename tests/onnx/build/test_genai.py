"""The folder for onnxruntime-genai: its configuration, and the same tokens as our own loop where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer

import lit_binq_onnx.build.genai as genai_module
from exporting import fusable_model, packed_model
from lit_binq.errors import LitBinqError
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.build.genai import CONFIG
from lit_binq_onnx.runtime.generate import generate
from lit_binq_onnx.runtime.library import library_path
from lit_binq_onnx.runtime.session import FUSED, MODEL, OnnxModel
from native import require_native

PROMPT = "The cat sat on"


def export(kind: str, folder: Path) -> dict[str, Any]:
    model = packed_model("opt") if kind == "opt" else fusable_model(kind)
    export_onnx(model, byte_tokenizer(), folder, target="genai", head_bits=8, check=False)
    return json.loads((folder / CONFIG).read_text())


def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fused = export("qwen3", tmp_path / "fused")
    decoder = fused["model"]["decoder"]
    assert (decoder["filename"], fused["search"]["past_present_share_buffer"]) == (FUSED, True)
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (16, 2, 2)
    assert "position_ids" not in decoder["inputs"]
    assert (fused["model"]["type"], fused["model"]["eos_token_id"], fused["model"]["vocab_size"]) == ("qwen3", 257, 260)
    if library_path() is not None:
        # relative and within the folder: that is all that onnxruntime-genai allows
        assert (tmp_path / "fused" / decoder["session_options"]["custom_ops_library"]).is_file()
    monkeypatch.setattr(genai_module, "library_path", lambda: None)
    traced = export("opt", tmp_path / "traced")
    decoder = traced["model"]["decoder"]
    assert (decoder["filename"], traced["search"]["past_present_share_buffer"]) == (MODEL, False)
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert traced["model"]["type"] == "decoder"
    assert "custom_ops_library" not in decoder["session_options"]
    assert "no operator library to copy" in caplog.text


def test_caches_of_several_shapes_are_refused(tmp_path: Path) -> None:
    """The configuration would state the first block's for all."""
    model = packed_model("llama")
    wide = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(wide, name, torch.nn.Linear(32, 32, bias=False))
    wide.num_key_value_groups = 1
    with pytest.raises(LitBinqError, match=r"several cache shapes \(2 heads of 8, 4 heads of 8\), expected 'ort'"):
        export_onnx(model, byte_tokenizer(), tmp_path / "out", target="genai", check=False)
    assert not (tmp_path / "out").exists()


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match="target: got 'llama'"):
        export_onnx(packed_model("llama"), byte_tokenizer(), tmp_path / "out", target="llama")  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "opt"])
def test_greedy_tokens_equal_our_loop(kind: str, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    require_native()
    export(kind, tmp_path / "out")
    tokenizer = byte_tokenizer()
    ours = generate(OnnxModel(tmp_path / "out", native=True, threads=1), tokenizer, PROMPT, 20)
    list(ours)
    model = og.Model(str(tmp_path / "out"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokenizer(PROMPT)["input_ids"])
    theirs: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs[: len(ours.token_ids)] == ours.token_ids
    assert len(set(theirs)) > 1 or kind in ("opt", "qwen3")  # tied random embeddings may repeat one token
    assert og.Tokenizer(model).encode(PROMPT).tolist() == tokenizer(PROMPT)["input_ids"]
