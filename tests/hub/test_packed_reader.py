"""Damaged and hostile packed folders: one line at once, whatever is wrong; never another model, time or memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HELPERS, ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from lit_binq.errors import LitBinqError
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.kv_cache import kv_bits
from packed_models import pack


@pytest.fixture
def packed(llama, tokenizer, tmp_path) -> Path:
    save_packed(pack(llama), tokenizer, tmp_path / "packed", facts={})
    return tmp_path / "packed"


def change(path: Path, *keys: Any, value: Any) -> None:
    """Set one value inside a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(LitBinqError, match=match) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [None, 3, 0.5, "text", [], ["a"], True])
@pytest.mark.parametrize("key", ["linears", "tied", "unquantized_dtype", "true_bits", "dense_weights", "facts"])
def test_values_of_another_kind(key, value, packed):
    if (key in ("true_bits", "dense_weights") and value in (3, 0.5) and value is not True) or (
        key == "unquantized_dtype" and value == "text"
    ):
        match = rf"{key} is 0\.5|says {key}|unquantized_dtype is 'text', expected one of float16"
    else:
        match = f"lit_binq.json: {key} is "
    change(packed / "lit_binq.json", key, value=value)
    refused(packed, match)


@pytest.mark.parametrize("value", [True, 3, [4], {"4": 4}, "4", 4.5])
def test_bits_of_keys_that_are_none(value, packed):
    change(packed / "lit_binq.json", "kv_bits", value=value)
    refused(packed, "asks for kv_bits")


@pytest.mark.parametrize("value", [[], {}, None, True, 2.0, "2", 2**70, [2]])
def test_versions_that_are_none(value, packed):
    change(packed / "lit_binq.json", "version", value=value)
    refused(packed, "expected 3 or 2")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "\ud800", "nul"])
@pytest.mark.parametrize("name", ["lit_binq.json", "config.json", "generation_config.json", "tokenizer_config.json"])
def test_text_that_no_parser_likes(name, text, packed):
    (packed / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(packed, "is damaged|format version")


LINEAR = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "entry",
    [
        {"format": "grouped", "group": 2**62},
        {"format": "grouped", "group": 8.0},
        {"format": "grouped", "group": True},
        {"format": "grouped", "group": -8},
        {"format": "planes", "columns1": 10**9},
        {"format": "planes", "columns7": 1},
        {"format": "low_rank", "rank": 8 * 10**9},
        {"format": "dense_only", "counted_bits": 10**15},
        {"format": "two_plane", "group": 8, "levels": 4, "outliers": 10**9},
        {"format": "two_plane", "group": 8, "in_features": 10**9},
        {"format": "row_column", "dtype": 3},
        {"format": "dense_only"},
        {"format": ["row_column"]},
        "row_column",
        None,
    ],
    ids=str,
)
def test_layouts_that_no_file_bears_out(entry, packed):
    change(packed / "lit_binq.json", "linears", LINEAR, value=entry)
    refused(packed, "up_proj")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 3000),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 2**40),
        ("hidden_size", 2**31),
        ("intermediate_size", 10**12),
        ("vocab_size", 10**10),
        ("head_dim", 2**33),
        ("num_labels", 10**8),
        ("rms_norm_eps", {}),
        ("rope_parameters", {"rope_type": "longrope"}),
        ("model_type", "gpt2"),
        ("auto_map", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("torch_dtype", "int8"),
    ],
)
def test_configurations_that_no_file_bears_out(key, value, packed):
    """No loop over a number that a file made up, no memory of its size, nobody asked to trust code."""
    change(packed / "config.json", key, value=value)
    if key in ("auto_map", "torch_dtype"):  # of no account: another class is built, in float32
        load_packed(packed)
    else:
        refused(packed, "config.json|model.safetensors")


def test_buffers_that_no_file_holds_are_bounded(tokenizer, tmp_path):
    """A mask of all positions, say: a configuration may ask for any size."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=260, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48,
                          attention_types=[[["global"], 1]], max_position_embeddings=64, pad_token_id=258)  # fmt: skip
    save_packed(pack(GPTNeoForCausalLM(config)), tokenizer, tmp_path / "p", facts={})
    load_packed(tmp_path / "p")
    change(tmp_path / "p" / "config.json", "max_position_embeddings", value=2**18)
    refused(tmp_path / "p", r"wpe\.weight|bytes that no file holds")


@pytest.mark.parametrize(
    "tied",
    [
        {"lm_head.weight": "nothing"},
        {"nothing": "model.embed_tokens.weight"},
        {"lm_head.weight": "model.norm.weight"},
        {"lm_head.weight": "lm_head.weight"},
        {"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"},
        {"lm_head.weight": 3},
        {"lm_head.weight": ["model.embed_tokens.weight"]},
        {"a\nb": 16},
        {"a\nb": "model.embed_tokens.weight"},
        {},
    ],
)
def test_ties_that_cannot_be(tied, packed):
    change(packed / "lit_binq.json", "tied", value=tied)
    refused(packed, "tie|lacks the tensor|is tied to")


def test_figures_that_the_tensors_belie(packed):
    change(packed / "lit_binq.json", "true_bits", value=1.0)
    refused(packed, "says true_bits 1.0, but its tensors say")


def test_tensors_of_another_dtype_and_size(packed):
    path = packed / "model.safetensors"
    tensors = load_file(path)
    for name, other in (
        (f"{LINEAR}.codes", tensors[f"{LINEAR}.codes"].to(torch.int8)),
        (f"{LINEAR}.row_scale", tensors[f"{LINEAR}.row_scale"].float()),
        ("model.norm.weight", tensors["model.norm.weight"].to(torch.float8_e4m3fn)),
        ("model.norm.weight", tensors["model.norm.weight"][:0]),
        ("model.norm.weight", tensors["model.norm.weight"][None]),
    ):
        save_file(tensors | {name: other.contiguous()}, path)
        refused(packed, name)


def test_a_reader_that_panics_is_one_line(packed, monkeypatch):
    """Libraries in Rust end with an exception that is none of Exception's kind."""

    class PanicException(BaseException):
        pass

    def panics(*_: Any, **__: Any) -> None:
        raise PanicException("index out of range\nstack")

    monkeypatch.setattr("lit_binq.hub.save_load.AutoTokenizer.from_pretrained", panics)
    refused(packed, r"tokenizer is damaged or missing \(index out of range\)")


@pytest.mark.slow
def test_random_damage(tmp_path):
    """The fuzzer, briefly; it runs by itself, since it limits its process's memory."""
    fuzzer = HELPERS / "packed_fuzz.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(fuzzer), "--runs", "200", "--seed", "0", "--keep", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "200 runs" in result.stdout


def test_a_library_that_quotes_all_of_it_is_cut_short(packed):
    values = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(values | {"[" * 3000: 1, "hidden_size": "[" * 3000}))
    refused(packed, r"config\.json is damaged")


def test_what_is_read_is_what_is_written(packed):
    """The control: the same folder, unharmed."""
    model, _ = load_packed(packed)
    assert kv_bits(model) == 0
    assert isinstance(model, nn.Module)
