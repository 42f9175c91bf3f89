"""What a packed folder's configuration tells other programs and our own reader: heads, attention, who reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from fitting import fit
from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.errors import LitBinqError
from lit_binq.hub import config as packed_config
from lit_binq.hub import save_load as hub
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.load import load_model
from packed_models import logits, pack


def own_head(folder: Path) -> Path:
    """Give a tied checkpoint a head of its own and leave its configuration as it is."""
    tensors = load_file(folder / "model.safetensors")
    head = 0.15 * torch.randn(260, 32, generator=torch.Generator().manual_seed(7))
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    return folder


def recomputed(source: Path, packed: Path) -> PreTrainedModel:
    """The model of a packed folder in plain transformers: its tensors read and dequantized here."""
    stored = load_file(packed / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source)
    state = model.state_dict()
    for name in state:
        module = name.removesuffix(".weight")
        if name in stored:
            state[name] = stored[name].float()
        elif f"{module}.codes" in stored:
            codes, r, c = (stored[f"{module}.{part}"] for part in ("codes", "row_scale", "col_scale"))
            bits = (codes[..., None].int() >> torch.arange(8)) & 1
            signs = bits.flatten(1)[:, : len(c)].float() * 2 - 1
            state[name] = r.float()[:, None] * signs * c.float()
        else:
            assert name == "lm_head.weight"
            state[name] = stored["model.embed_tokens.weight"].float()
    model.load_state_dict(state)
    return model.eval()


def test_a_head_of_its_own_survives_a_configuration_that_says_tied(make_source, text_file, tmp_path, recwarn):
    source = own_head(make_source())
    closed = {"tuning": BlockTuning(), "end_to_end": ModelTuning()}
    fit(source, text_file, tmp_path / "packed", **closed)
    model, _ = load_packed(tmp_path / "packed")
    torch.testing.assert_close(logits(model), logits(recomputed(source, tmp_path / "packed")), atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings is False
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["tie_word_embeddings"] is False
    model.tie_weights()  # whatever ties by the configuration leaves the head alone
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_tied_fit_is_what_plain_transformers_computes(make_source, text_file, tmp_path):
    source = make_source()
    fit(source, text_file, tmp_path / "packed", tuning=BlockTuning(), end_to_end=ModelTuning())
    model, _ = load_packed(tmp_path / "packed")
    torch.testing.assert_close(logits(model), logits(recomputed(source, tmp_path / "packed")), atol=1e-5, rtol=1e-5)


def test_folders_of_version_2_are_read_by_what_they_hold(make_source, tokenizer, tmp_path):
    """They took the flag from their source, and named no quantization method."""
    model = pack(load_model(str(own_head(make_source()))))
    folder = tmp_path / "packed"
    save_packed(model, tokenizer, folder, facts={})
    for name, changes in (("lit_binq.json", {"version": 2}), ("config.json", {"tie_word_embeddings": True})):
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(
            json.dumps({k: v for k, v in values.items() if k not in ("quantization_config", "transformers_weights")})
        )
    assert torch.equal(logits(load_packed(folder)[0]), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_flag_that_contradicts_the_tensors_is_refused(tied, make_model, tokenizer, tmp_path):
    save_packed(pack(make_model("llama", tied=tied)), tokenizer, tmp_path / "p", facts={})
    path = tmp_path / "p" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": not tied}))
    with pytest.raises(LitBinqError, match=f"tie_word_embeddings {not tied}, but lit_binq.json the opposite"):
        load_packed(tmp_path / "p")


def test_the_attention_function_is_kept(model_folder, tokenizer, tmp_path):
    model = pack(AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager"))
    save_packed(model, tokenizer, tmp_path / "p", facts={})
    again, _ = load_packed(tmp_path / "p")
    assert again.config._attn_implementation == "eager"
    assert torch.equal(logits(again), logits(model))


def test_a_resized_vocabulary_is_kept(make_model, tokenizer, tmp_path):
    model = make_model("llama")
    model.resize_token_embeddings(300, mean_resizing=False)
    pack(model)
    save_packed(model, tokenizer, tmp_path / "p", facts={})
    again, _ = load_packed(tmp_path / "p")
    assert again.config.vocab_size == 300
    assert torch.equal(logits(again), logits(model))


def test_generation_settings_are_kept_even_if_they_contradict_each_other(llama, tokenizer, tmp_path):
    settings = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=False, eos_token_id=[257, 3], bos_token_id=256)
    model = pack(llama)
    model.generation_config = settings
    save_packed(model, tokenizer, tmp_path / "p", facts={})
    again = load_packed(tmp_path / "p")[0].generation_config
    kept = ("temperature", "top_p", "do_sample", "eos_token_id", "bos_token_id")
    assert [getattr(again, k) for k in kept] == [0.6, 0.9, False, [257, 3], 256]


def test_generation_settings_inside_the_configuration_do_no_harm(make_source, text_file, tmp_path):
    """transformers refuses to save such a configuration, which a fit would have noticed at its end."""
    source = make_source(blocks=1)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.7, "do_sample": True}))
    fit(source, text_file, tmp_path / "packed", tuning=BlockTuning(), end_to_end=ModelTuning())
    load_packed(tmp_path / "packed")


def test_a_fit_refuses_what_it_reads_differently(make_source, text_file, tmp_path, monkeypatch):
    """Whatever the reason: the file is another, or its reader is. Nothing is left behind."""
    original = hub.save_file

    def flipped(tensors, *args, **kwargs):
        name = "model.layers.1.mlp.up_proj.codes"
        return original(tensors | {name: tensors[name] ^ 1}, *args, **kwargs)

    monkeypatch.setattr(hub, "save_file", flipped)
    source = make_source()
    with pytest.raises(
        LitBinqError, match=r"layers\.1\.mlp\.up_proj\.codes\), expected the same bits; nothing"
    ) as caught:
        fit(source, text_file, tmp_path / "out" / "packed", tuning=BlockTuning(), end_to_end=ModelTuning())
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["packed-ckpt"]


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.1), ("max_position_embeddings", 64)])
def test_a_configuration_that_computes_otherwise_is_noticed(key, value, llama, tokenizer, tmp_path, monkeypatch):
    """All tensors are right, but logits are not, or will not be some tokens further on."""
    write = hub.write_configuration

    def other(model, folder):
        write(model, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    monkeypatch.setattr(hub, "write_configuration", other)
    with pytest.raises(LitBinqError, match=rf"configuration: {key} is \S+, read again {value}\)"):
        save_packed(pack(llama), tokenizer, tmp_path / "p", facts={}, windows=torch.arange(12).reshape(2, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_computes_otherwise_is_noticed(llama, tokenizer, tmp_path, monkeypatch):
    """Configuration and tensors are the same, and the model that is made of them is not."""
    read = hub.read_model

    def other(folder, manifest):
        model = read(folder, manifest)
        model.model.norm.variance_epsilon = 0.1
        return model

    monkeypatch.setattr(hub, "read_model", other)
    with pytest.raises(LitBinqError, match=r"\(logits, by up to \d\S+\), expected the same bits"):
        save_packed(pack(llama), tokenizer, tmp_path / "p", facts={}, windows=torch.arange(12).reshape(2, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_is_not_kept_is_refused_before_the_fit(make_source, text_file, tmp_path, monkeypatch):
    """Here by a class of transformers that forgets a value it was given."""
    original = packed_config.read_configuration

    def forgetful(folder):
        config = original(folder)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
        return config

    monkeypatch.setattr(packed_config, "read_configuration", forgetful)
    with pytest.raises(LitBinqError, match="configuration does not survive being written: rope_parameters is"):
        fit(make_source(), text_file, tmp_path / "out" / "packed", tuning=BlockTuning(), end_to_end=ModelTuning())
    assert not (tmp_path / "out" / "packed").exists()


LOADS = """
import sys
{imports}
from transformers import {kind}
try:
    {kind}.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.grid(1)
@pytest.mark.parametrize("imports", ["", "import lit_binq", "import lit_binq.hub.save_load"])
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_plain_transformers_refuses_a_packed_folder(kind, imports, llama, tokenizer, tmp_path):
    """It would make fresh random linears, and say so only in a warning."""
    save_packed(pack(llama), tokenizer, tmp_path / "p", facts={})
    code = LOADS.format(imports=imports, kind=kind)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 3, result.stderr
    assert "load this folder with lit_binq.hub.load_packed of the Python package lit-binq" in result.stdout


def test_other_programs_find_a_quantization_method(llama, tokenizer, tmp_path):
    save_packed(pack(llama), tokenizer, tmp_path / "p", facts={})
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lit_binq"}
    again, _ = load_packed(tmp_path / "p")
    assert not hasattr(again.config, "quantization_config")
    assert not hasattr(again.config, "transformers_weights")
