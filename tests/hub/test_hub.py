"""Packed folders: exact reload, honest bit counts, atomic writing, one-line errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_binq.errors import LitBinqError
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import packed_linears
from lit_binq.hub import save_load as hub
from lit_binq.hub.bits import block_linear_weights, dense_weights, file_bits, true_bits
from lit_binq.hub.save_load import load_packed, round_unquantized, save_packed
from lit_binq.utils.json_records import DIAGNOSTICS
from packed_models import logits, pack


@pytest.fixture
def packed_folder(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    save_packed(pack(llama), tokenizer, tmp_path / "packed", facts={"made": "in a test"})
    return tmp_path / "packed"


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("unquantized_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reload_is_bit_identical(kind, tied, unquantized_dtype, make_model, tokenizer, tmp_path):
    model = pack(make_model(kind, tied=tied))
    before = logits(model)
    save_packed(model, tokenizer, tmp_path / "p", facts={}, unquantized_dtype=unquantized_dtype)
    again, reloaded_tokenizer = load_packed(tmp_path / "p")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(model), before) == (unquantized_dtype == torch.float32)  # rounding really happened
    assert packed_linears(again).keys() == packed_linears(model).keys()
    assert not again.training
    text = "Tokens survive, too: 1984!"
    assert reloaded_tokenizer(text).input_ids == tokenizer(text).input_ids
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embedding is head) == tied
    stored = load_file(tmp_path / "p" / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied


def test_reload_does_not_touch_the_random_state(packed_folder):
    torch.manual_seed(5)
    load_packed(packed_folder)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_saving_a_reloaded_model_gives_the_same_weights_file(packed_folder, tmp_path):
    model, tokenizer = load_packed(packed_folder)
    save_packed(model, tokenizer, tmp_path / "second", facts={})
    one, two = (f / "model.safetensors" for f in (packed_folder, tmp_path / "second"))
    assert one.read_bytes() == two.read_bytes()


def test_bit_counts_equal_the_bytes_on_disk(any_model, tokenizer, tmp_path):
    dense = sum(p.numel() for p in any_model.parameters())
    linear_weights = sum(
        m.weight.numel() for name, m in any_model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    )
    model = pack(any_model)
    folder = tmp_path / "p"
    save_packed(model, tokenizer, folder, facts={})
    stored = load_file(folder / "model.safetensors")
    weight_bytes = sum(
        t.numel() * t.element_size()
        for name, t in stored.items()
        if name.rpartition(".")[2] in ("codes", "row_scale", "col_scale")
    )
    assert block_linear_weights(model) == linear_weights
    assert true_bits(model) == 8 * weight_bytes / linear_weights
    assert read_manifest(folder)["true_bits"] == true_bits(model)
    assert dense_weights(model) == dense
    assert file_bits(folder) == 8 * sum(f.stat().st_size for f in folder.iterdir()) / dense
    before = file_bits(folder)
    (folder / DIAGNOSTICS).write_text("{}")  # the fit's, not the model's
    assert file_bits(folder) == before
    others = {t.dtype for name, t in stored.items() if name.rpartition(".")[2] not in ("codes",)}
    assert others == {torch.float16}


def test_the_manifest_is_json_for_every_reader(llama, tokenizer, tmp_path):
    save_packed(pack(llama), tokenizer, tmp_path / "p", facts={"loss": float("inf")})
    text = (tmp_path / "p" / "lit_binq.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["facts"] == {"loss": None}


def test_other_users_can_read_the_folder(packed_folder):
    assert packed_folder.stat().st_mode & 0o055 == 0o055
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in packed_folder.iterdir())


def test_facts_are_kept(packed_folder):
    manifest = read_manifest(packed_folder)
    assert manifest["facts"] == {"made": "in a test"}
    assert manifest["version"] == 3
    assert all(entry == {"format": "row_column"} for entry in manifest["linears"].values())


def test_true_bits_needs_packed_linears(llama):
    with pytest.raises(LitBinqError, match="no packed linear"):
        true_bits(llama)


def test_round_rest_rounds_once_and_leaves_packed_weights(llama):
    model = pack(llama)
    scale = model.model.layers[0].mlp.up_proj.row_scale.clone()
    round_unquantized(model)
    once = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(v.half().float(), v) for v in once.values() if v.dtype == torch.float32)
    round_unquantized(model)
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.model.layers[0].mlp.up_proj.row_scale, scale)


def test_round_rest_widens_a_bfloat16_model_and_keeps_ties(make_model):
    model = make_model("qwen2").to(torch.bfloat16)
    model = pack(model)
    round_unquantized(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_overflow_is_refused_and_changes_nothing(llama, tokenizer, tmp_path):
    model = pack(llama)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 1e6
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LitBinqError, match=r"layers\.1\.input_layernorm\.weight.*1e\+06.*unquantized_dtype"):
        save_packed(model, tokenizer, tmp_path / "p", facts={})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    save_packed(model, tokenizer, tmp_path / "p", facts={}, unquantized_dtype=torch.bfloat16)
    assert torch.isfinite(logits(load_packed(tmp_path / "p")[0])).all()


def test_a_failed_save_leaves_the_old_folder(packed_folder, tokenizer, monkeypatch):
    before = {f.name: f.read_bytes() for f in packed_folder.iterdir()}
    model, _ = load_packed(packed_folder)
    monkeypatch.setattr(
        "lit_binq.hub.save_load.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_packed(model, tokenizer, packed_folder, facts={"made": "later"})
    assert {f.name: f.read_bytes() for f in packed_folder.iterdir()} == before
    assert list(packed_folder.parent.iterdir()) == [packed_folder]


def test_an_older_packed_folder_is_replaced_and_files_of_others_stay(packed_folder, tokenizer):
    model, _ = load_packed(packed_folder)
    (packed_folder / "notes.txt").write_text("x")
    (packed_folder / "chat_template.jinja").write_text("x")
    manifest = json.loads((packed_folder / "lit_binq.json").read_text())
    manifest["files"].append("chat_template.jinja")  # as if the older model had had one
    (packed_folder / "lit_binq.json").write_text(json.dumps(manifest))
    save_packed(model, tokenizer, packed_folder, facts={"made": "later"})
    assert read_manifest(packed_folder)["facts"] == {"made": "later"}
    assert (packed_folder / "notes.txt").exists()
    assert not (packed_folder / "chat_template.jinja").exists()
    assert list(packed_folder.parent.iterdir()) == [packed_folder]


def test_other_peoples_folders_are_not_replaced(llama, tokenizer, tmp_path):
    model = pack(llama)
    (tmp_path / "mine").mkdir()
    save_packed(model, tokenizer, tmp_path / "mine", facts={})  # empty: fine
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(LitBinqError, match="holds other files"):
        save_packed(model, tokenizer, tmp_path / "theirs", facts={})
    with pytest.raises(LitBinqError, match="a file of this name"):
        save_packed(model, tokenizer, tmp_path / "theirs" / "thesis.txt", facts={})
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "name", ["lit_binq.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.98])
def test_truncated_files_give_one_clear_line(packed_folder, name, share):
    path = packed_folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LitBinqError) as caught:
        load_packed(packed_folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(packed_folder) in message
    assert name in message or name.partition(".")[0] in message


@pytest.mark.parametrize("name", ["lit_binq.json", "config.json", "model.safetensors"])
def test_missing_files_are_named(packed_folder, name):
    (packed_folder / name).unlink()
    with pytest.raises(LitBinqError, match=name.replace(".", r"\.")):
        load_packed(packed_folder)


def test_not_a_packed_folder(model_folder, tmp_path):
    with pytest.raises(LitBinqError, match="not a packed folder"):
        load_packed(model_folder)
    with pytest.raises(LitBinqError, match="no such folder"):
        load_packed(tmp_path / "nothing")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "lit_binq.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_contradictory_folders_are_refused(packed_folder, tmp_path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(packed_folder, tmp_path / name))

    folder = broken("version")
    edit(folder, version=99)
    with pytest.raises(LitBinqError, match="version 99, expected 3 or 2"):
        load_packed(folder)

    folder = broken("format")
    edit(folder, linears={"model.layers.0.mlp.up_proj": {"format": "ternary"}})
    with pytest.raises(LitBinqError, match=r"'ternary', expected one of \["):
        load_packed(folder)

    folder = broken("names")
    edit(folder, linears={"model.layers.7.mlp.up_proj": {"format": "row_column"}})
    with pytest.raises(LitBinqError, match=r"layers\.7\.mlp\.up_proj, which is no linear"):
        load_packed(folder)

    folder = broken("shape")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.codes"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(LitBinqError, match=r"down_proj\.codes is uint8 \(32, 5\), expected uint8 \(32, 6\)"):
        load_packed(folder)

    folder = broken("dtype")
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(LitBinqError, match=r"model\.norm\.weight is float32 .* expected float16"):
        load_packed(folder)

    folder = broken("lacking")
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(LitBinqError, match=r"lacks the tensor model\.norm\.weight"):
        load_packed(folder)

    folder = broken("extra")
    save_file(tensors | {"surplus": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(LitBinqError, match="unexpected tensor surplus"):
        load_packed(folder)


@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_bits_are_compared_whatever_the_shape(shape):
    one = torch.full(shape, float("nan"))
    assert hub._equal(one, one.clone())
    assert not one.numel() or not hub._equal(torch.zeros(shape), -torch.zeros(shape))
    assert not hub._equal(one, one.half())


def test_a_folder_with_an_older_key_is_read(packed_folder):
    path = packed_folder / "lit_binq.json"
    manifest = json.loads(path.read_text())
    manifest["rest_dtype"] = manifest.pop("unquantized_dtype")
    bits = true_bits(load_packed(packed_folder)[0])
    path.write_text(json.dumps(manifest))
    assert true_bits(load_packed(packed_folder)[0]) == bits
