"""Loading: folders and GGUF files give plain, finite models; everything else gives one clear line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, T5Config

from gguf_cases import write_gguf
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_model, load_tokenizer


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(24).reshape(2, 12) * 5 % 256).logits


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
def test_a_folder_gives_the_model_that_was_saved(kind, make_model, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_gguf_file_gives_a_plain_model_that_can_be_saved(make_model, tmp_path):
    model = make_model("llama")
    write_gguf(model, tmp_path / "tiny.gguf", "smollm")
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    loaded.save_pretrained(tmp_path / "copy")
    load_tokenizer(str(tmp_path / "tiny.gguf")).save_pretrained(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    copy, tokenizer = load_model(str(tmp_path / "copy")), load_tokenizer(str(tmp_path / "copy"))
    assert torch.equal(logits(copy), logits(model))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12").input_ids) == ["a", "Ġ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<eos>")
    message = [{"role": "user", "content": "Hi 12"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<bos>Hi 12<eos>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("smollm", ["a", "Ġ", "1", "2"]), ("gpt-2", ["a", "Ġ", "12"]), (None, ["a", "Ġ", "12"])],
)
def test_digits_are_split_only_where_the_gguf_file_says_so(pre, pieces, make_model, tmp_path):
    write_gguf(make_model("llama", blocks=1), tmp_path / "tiny.gguf", pre)
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    ids = tokenizer("a 12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == "a 12"


def one_line(source: Path | str, match: str, load=load_model) -> None:
    with pytest.raises(LitBinqError, match=match) as caught:
        load(str(source))
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("source", ["/no/such/model.gguf", "./nothing", "~/nothing", "a/b/c", "model.gguf"])
def test_no_such_path(source, load):
    one_line(source, "no such file or folder", load)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_id_that_cannot_be_had(load):
    one_line("nobody/no-such-model", "spelled right, and is there network", load)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_things_that_are_no_model(load, tmp_path):
    one_line(tmp_path, r"no config\.json", load)
    (tmp_path / "model.bin").write_bytes(b"x")
    one_line(tmp_path / "model.bin", r"expected a folder or a \.gguf file", load)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    one_line(tmp_path / "broken.gguf", "cannot be loaded", load)


def test_a_folder_without_tokenizer(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    one_line(tmp_path, "no tokenizer files", load_tokenizer)


def test_unknown_and_unfit_architectures(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus", "hidden_size": 4}')
    one_line(tmp_path, "abacus")
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    one_line(tmp_path, "'t5' is not a causal language model")
    (tmp_path / "config.json").write_text('{"model_type": ')
    one_line(tmp_path, "cannot be loaded")


def test_a_checkpoint_of_another_head_is_refused(tmp_path):
    """transformers would fill what is missing with random numbers and only log it."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        is_decoder=True,
    )
    BertForMaskedLM(config).bert.save_pretrained(tmp_path)
    one_line(tmp_path, r"lacks \d+ tensors of BertLMHeadModel \(first: cls\.")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(bad, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one_line(folder, r"model\.layers\.1\.mlp\.up_proj\.weight has 1 NaN or infinite values")


def test_a_truncated_checkpoint(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    one_line(folder, "cannot be loaded")


def test_a_packed_folder_is_no_starting_point(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    (folder / "lit_binq.json").write_text("{}")
    one_line(folder, "a packed folder; expected a full-precision checkpoint")
    load_tokenizer(str(folder))
