"""Heads of GGUF files: as gguf's reader has them; damaged ones in one line and without memory; read once."""

import itertools
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Phi3Config

from gguf_cases import TEXTS, add_shape, finish, write_bpe, write_every_type, write_gguf, write_sentencepiece
from lit_binq.errors import LitBinqError
from lit_binq.models import gguf_files
from lit_binq.models.gguf_checks import require_stated
from lit_binq.models.gguf_files import read_gguf
from lit_binq.models.gguf_loading import read_once
from lit_binq.models.load import load_model, load_tokenizer


@pytest.fixture
def head(tmp_path) -> Path:
    write_every_type(tmp_path / "all.gguf")
    return tmp_path / "all.gguf"


@pytest.mark.parametrize("version", [2, 3])
def test_a_head_is_what_gguf_reads(head, version):
    head.write_bytes(b"GGUF" + struct.pack("<I", version) + head.read_bytes()[8:])
    ours, theirs = read_gguf(head), gguf.GGUFReader(head)
    assert ours.version == version
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.values) == list(fields)
    for key, field in fields.items():
        assert ours.get(key) == field.contents(), key
        assert type(ours.get(key)) is type(field.contents())
    assert ours.get("no.such") is None
    assert len(ours.tensors) == 6
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.type, mine.start, mine.bytes) == (
            other.name,
            other.tensor_type,
            other.data_offset,
            other.n_bytes,
        )
        assert mine.shape == tuple(int(n) for n in reversed(other.shape))


def refused(path: Path) -> str:
    with pytest.raises(LitBinqError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "cannot be loaded" in message
    return message


def test_a_file_cut_anywhere_is_refused(head):
    whole = head.read_bytes()
    end = max(tensor.start + tensor.bytes for tensor in read_gguf(head).tensors)  # padding follows, which may be cut
    for length in itertools.chain(range(0, 400), range(400, end, 37), range(end - 8, end)):
        head.write_bytes(whole[:length])
        refused(head)


@pytest.mark.slow
def test_bytes_overwritten_anywhere_cost_no_memory_and_no_traceback(head):
    """Lengths, counts, types and names in turn become as large as they can be."""
    whole = head.read_bytes()
    end = min(tensor.start for tensor in read_gguf(head).tensors)
    tracemalloc.start()
    messages: list[str] = []
    for place, (width, value) in itertools.product(range(0, end, 3), ((8, 2**64 - 1), (8, 2**60), (4, 2**31))):
        damaged = bytearray(whole)
        damaged[place : place + width] = value.to_bytes(width, "little")
        head.write_bytes(damaged)
        try:
            read_gguf(head)
        except LitBinqError as error:
            messages.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
    assert peak < 2**21


def test_what_is_no_file_of_ours(head):
    whole = head.read_bytes()
    assert "no such file" in refused(head.with_name("none.gguf")).lower()
    for content, words in (
        (b"", "it is empty"),
        (b"GG", "it ends inside its first 8 bytes"),
        (b"PK\x03\x04" + whole[4:], "it begins with"),
        (b"GGUF" + struct.pack("<I", 1) + whole[8:], "it is of version 1"),
        (b"GGUF" + struct.pack(">I", 3) + whole[8:], "it is big-endian"),
        (whole[:8] + struct.pack("<QQ", 2**50, 1) + whole[24:], "states 1125899906842624 tensors"),
        (whole[:16] + struct.pack("<Q", 2**50) + whole[24:], "states 1125899906842624 keys"),
    ):
        head.write_bytes(content)
        assert words in refused(head)


def written(path: Path, *add: object) -> Path:
    """A file of a tiny model with more keys and tensors: `add` are functions that take the writer."""
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer)
    for each in add:
        each(writer)  # type: ignore[operator]
    finish(writer)
    return path


def changed(path: Path, old: bytes, new: bytes) -> Path:
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    return path


def test_contradictions_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    one = np.ones((2, 32), np.float32)

    def twins(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("tensor.a", one)
        writer.add_tensor("tensor.b", one)

    assert "tensor tensor.a stands twice" in refused(changed(written(path, twins), b"tensor.b", b"tensor.a"))
    keys = (lambda w: w.add_uint8("key.a", 1), lambda w: w.add_uint8("key.b", 1))
    assert "key key.a stands twice" in refused(changed(written(path, *keys), b"key.b", b"key.a"))
    text = (lambda w: w.add_array("words", ["one", "two"]),)
    assert "string 1 of words is no UTF-8" in refused(changed(written(path, *text), b"two", b"\xff\xfe\xfd"))
    assert "general.architecture" in refused(changed(written(path), b"general.architecture", b"general.architectura"))
    assert "one of 3 parts" in refused(written(path, lambda w: w.add_uint16("split.count", 3)))
    assert read_gguf(written(path, lambda w: w.add_uint16("split.count", 1))).get("split.count") == 1
    assert "no power of two" in refused(written(path, lambda w: w.add_uint32("general.alignment", 48)))
    nested = changed(written(path, *text), struct.pack("<IQ", 8, 2), struct.pack("<IQ", 9, 2))
    assert "elements of type 9" in refused(nested)

    entry = struct.pack("<IQQIQ", 2, 32, 2, 0, 0)  # of a tensor: dimensions, sizes, type, offset
    for other, words in (
        (struct.pack("<IQQIQ", 2, 32, 2, 77, 0), "unknown type 77"),
        (struct.pack("<IQQIQ", 2, 33, 2, 2, 0), "does not divide into blocks of 32"),
        (struct.pack("<IQQIQ", 2, 32, 0, 0, 0), "does not divide"),
        (struct.pack("<IQQIQ", 5, 32, 2, 0, 0), "has 5 dimensions"),
        (struct.pack("<IQQIQ", 0, 32, 2, 0, 0), "has 0 dimensions"),
        (struct.pack("<IQQIQ", 2, 32, 3, 0, 0), "last byte of tensor"),
        (struct.pack("<IQQIQ", 2, 32, 2, 0, 2**63), "last byte of tensor"),
        (struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), "last byte of tensor"),
    ):
        written(path, lambda w: w.add_tensor("weight", one))
        assert words in refused(changed(path, entry, other))


def test_damage_reaches_the_user_in_one_line(tmp_path, make_model):
    write_gguf(make_model("llama"), tmp_path / "m.gguf", "smollm")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:-1])
    for load in (load_model, load_tokenizer):
        with pytest.raises(LitBinqError, match="it ends before the last byte of tensor") as caught:
            load(str(tmp_path / "m.gguf"))
        assert "\n" not in str(caught.value)


def test_a_file_is_read_once(tmp_path, make_model, monkeypatch):
    """However often model and tokenizer are loaded; and again as soon as the file has changed."""
    path, model = tmp_path / "m.gguf", make_model("llama")
    write_gguf(model, path, "smollm")
    reads: list[str] = []
    parse, init = gguf_files._parse, gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf_files, "_parse", lambda data: reads.append("ours") or parse(data))
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *a, **k: reads.append("gguf") or init(*a, **k))
    try:
        from transformers.integrations.gguf import reader
    except ImportError:
        pass
    else:
        metadata = reader._read_metadata
        monkeypatch.setattr(reader, "_read_metadata", lambda *a, **k: reads.append("transformers") or metadata(*a, **k))
    loaded = load_model(str(path))
    for _ in range(2):
        load_tokenizer(str(path))
    assert reads == ["ours"]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    other = make_model("llama", seed=5)
    write_gguf(other, path, "smollm")
    os.utime(path, ns=(1, 1))
    assert torch.equal(load_model(str(path)).lm_head.weight, other.lm_head.weight)
    assert reads == ["ours", "ours"]


def test_readers_of_other_files_are_left_alone(tmp_path):
    write_every_type(tmp_path / "a.gguf")
    write_bpe(tmp_path / "b.gguf", "llama", "smollm")
    real = gguf.GGUFReader
    with read_once(tmp_path / "a.gguf", True) as empty:
        assert not any(Path(empty).iterdir())
        assert isinstance(gguf.GGUFReader(tmp_path / "b.gguf"), real)
        mine, theirs = gguf.GGUFReader(tmp_path / "a.gguf"), real(tmp_path / "a.gguf")
        assert mine.get_field("texts").types == theirs.get_field("texts").types
        for a, b in zip(mine.tensors, theirs.tensors, strict=True):
            assert a.data.dtype == b.data.dtype
            assert np.array_equal(a.data, b.data)
            assert (a.n_elements, a.n_bytes, list(a.shape)) == (b.n_elements, b.n_bytes, list(b.shape))
    assert gguf.GGUFReader is real
    assert not Path(empty).exists()
    with pytest.raises(RuntimeError), read_once(tmp_path / "a.gguf", True):
        raise RuntimeError
    assert gguf.GGUFReader is real


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "F16"])
def test_quantized_weights_are_what_gguf_makes_of_them(type, tmp_path, make_model):
    """The test dequantizes with gguf itself, from a reader of gguf's."""
    model = make_model("llama")
    write_gguf(model, tmp_path / "dense.gguf", "smollm")
    dense = gguf.GGUFReader(tmp_path / "dense.gguf")
    kind = gguf.GGMLQuantizationType[type]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, field in dense.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in dense.tensors:
        # Quantized along the rows: 32 values a block. Only the down projection's rows, 48, do not divide.
        usable = len(tensor.shape) > 1 and tensor.shape[0] % 32 == 0
        kept = kind if usable else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kept), raw_dtype=kept)
    finish(writer)
    state = load_model(str(tmp_path / "m.gguf")).state_dict()
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.ffn_up", "model.layers.1.mlp.up_proj"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
        ("output_norm", "model.norm"),
    ):
        assert torch.equal(state[f"{ours}.weight"], torch.from_numpy(stored[f"{theirs}.weight"].astype(np.float32)))


FACTORS = np.linspace(1, 8, 4, dtype=np.float32)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (lambda w: w.add_tensor("rope_freqs.weight", FACTORS), r"does not take 1 tensors .*rope_freqs\.weight"),
        (lambda w: w.add_tensor("blk.1.attn_q.bias", np.ones(32, np.float32)), r"first: blk\.1\.attn_q\.bias"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "scaled by yarn None"),
        (lambda w: w.add_rope_scaling_factor(4.0), "scaled by linear 4.0"),
        (lambda w: w.add_sliding_window(16), "a sliding window of 16 tokens"),
    ],
)
def test_what_transformers_passes_over_is_refused(more, words, tmp_path, make_model):
    """It loads the first two without the tensor, the others with the rotary embeddings and masks of a plain LLaMA."""
    path = tmp_path / "m.gguf"
    write_gguf(make_model("llama"), path, "smollm", more)
    AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    with pytest.raises(LitBinqError, match=words) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    if "does not take" in words:
        load_model(str(path), drop_tensors=["rope_freqs"])


def test_a_share_of_rotated_dimensions_is_compared(tmp_path):
    config = Phi3Config(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    path = tmp_path / "m.gguf"
    for rotated, words in ((16, None), (12, "12 rotated dimensions of 16 a head")):
        writer = gguf.GGUFWriter(path, "phi3")
        add_shape(writer)
        writer.add_rope_dimension_count(rotated)
        finish(writer)
        if words is None:
            require_stated(read_gguf(path), config)
            continue
        with pytest.raises(LitBinqError, match=words):
            require_stated(read_gguf(path), config)
        config.rope_parameters["partial_rotary_factor"] = 0.75
        require_stated(read_gguf(path), config)


def test_what_changes_nothing_is_let_through(tmp_path, make_model):
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_sliding_window(10**6)  # longer than the context

    write_gguf(make_model("llama"), tmp_path / "m.gguf", "smollm", more)
    load_model(str(tmp_path / "m.gguf"))


KINDS = {
    "llama smollm": lambda path: write_bpe(path, "llama", "smollm"),
    "llama llama-bpe": lambda path: write_bpe(path, "llama", "llama-bpe", add_bos=True),
    "qwen2": lambda path: write_bpe(path, "qwen2", "qwen2"),
    "gpt2": lambda path: write_bpe(path, "gpt2", "gpt-2"),
    "llama": lambda path: write_sentencepiece(path, "llama"),
    "gemma3": lambda path: write_sentencepiece(path, "gemma3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_what_transformers_makes_of_the_file(kind, tmp_path):
    """Read by transformers and gguf on their own; what differs is what `load_tokenizer` repairs."""
    path = tmp_path / "m.gguf"
    KINDS[kind](path)
    ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert type(ours) is type(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert ours.all_special_ids == theirs.all_special_ids
    assert {str(t): repr(t) for t in ours.added_tokens_decoder.values()} == {
        str(t): repr(t) for t in theirs.added_tokens_decoder.values()
    }
    if kind != "llama smollm":
        for text in TEXTS[:3] + TEXTS[4:]:
            ids = theirs(text).input_ids
            assert ours(text).input_ids == ids
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_what_lies_beside_a_gguf_file_says_nothing_about_it(tmp_path):
    write_bpe(tmp_path / "other.gguf", "llama", "smollm")
    other = load_tokenizer(str(tmp_path / "other.gguf"))
    other.add_tokens(["the other"])
    other.chat_template = "other"
    (tmp_path / "m").mkdir()
    other.save_pretrained(tmp_path / "m")
    write_sentencepiece(tmp_path / "m" / "m.gguf", "llama")
    tokenizer = load_tokenizer(str(tmp_path / "m" / "m.gguf"))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert tokenizer.chat_template is None
    assert tokenizer("the").input_ids[0] == 2


@pytest.mark.parametrize(
    ("architecture", "rule"),
    [
        ("llama", "smollm"),
        ("llama", "llama-bpe"),
        ("llama", None),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen2"),
        ("gpt2", "gpt-2"),
        ("starcoder2", "starcoder"),
        ("gpt2", "tekken"),
        ("llama", "sentencepiece"),
        ("gemma3", "sentencepiece"),
    ],
)
def test_a_tokenizer_is_the_same_once_saved_and_reloaded(architecture, rule, tmp_path):
    """The class that reads it again has rules of its own, and takes them instead of those in tokenizer.json."""
    path = tmp_path / "m.gguf"
    write_sentencepiece(path, architecture) if rule == "sentencepiece" else write_bpe(path, architecture, rule)
    tokenizer = load_tokenizer(str(path))
    tokenizer.save_pretrained(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "with")
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "with")  # as beside a model, which has its say too
    for folder in ("alone", "with"):
        again = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert json.loads(again.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())
        for text in TEXTS:
            ids = tokenizer(text).input_ids
            assert again(text).input_ids == ids
            assert again.decode(ids) == tokenizer.decode(ids)
        for name in ("special_tokens_map", "all_special_ids", "padding_side", "chat_template", "model_input_names"):
            assert getattr(again, name) == getattr(tokenizer, name), name


def test_a_qwen_tokenizer_composes_its_text(tmp_path):
    """As its own tokenizer.json does; a GGUF file has no word for it."""
    write_bpe(tmp_path / "m.gguf", "qwen2", "qwen2")
    tokenizer = load_tokenizer(str(tmp_path / "m.gguf"))
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids == [tokenizer.convert_tokens_to_ids("Ã©")]


def test_a_splitting_rule_without_a_name_here_is_told(tmp_path, caplog):
    for rule, told in (("gpt-2", False), ("starcoder", False), ("qwen2", False), ("some-new-rule", True), (None, True)):
        caplog.clear()
        write_bpe(tmp_path / "m.gguf", "llama", rule)
        load_tokenizer(str(tmp_path / "m.gguf"))
        assert (f"the name {rule!r}, which is not known here" in caplog.text) == told


def test_a_special_token_outside_the_vocabulary(tmp_path):
    write_bpe(tmp_path / "m.gguf", "llama", "smollm")
    whole = (tmp_path / "m.gguf").read_bytes()
    key = b"tokenizer.ggml.padding_token_id" + struct.pack("<I", 4)
    at = whole.index(key) + len(key)
    (tmp_path / "m.gguf").write_bytes(whole[:at] + struct.pack("<I", 999_999) + whole[at + 4 :])
    with pytest.raises(LitBinqError, match=r"cannot be loaded|padding_token_id is 999999") as caught:
        load_tokenizer(str(tmp_path / "m.gguf"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif("LIT_BINQ_GGUF" not in os.environ, reason="LIT_BINQ_GGUF names no .gguf file")
def test_a_real_file():
    path = Path(os.environ["LIT_BINQ_GGUF"])
    ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in [*TEXTS, Path(__file__).read_text()]:
        assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text.replace("e\u0301", "é") or (
            ours.decode(ours(text, add_special_tokens=False).input_ids) == text
        )
    head, reader = read_gguf(path), gguf.GGUFReader(path)
    assert head.get("tokenizer.ggml.tokens") == reader.get_field("tokenizer.ggml.tokens").contents()
