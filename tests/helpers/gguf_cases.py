"""GGUF files for tests, written with the gguf package: value types, tensor types, and the usual kinds of tokenizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

ALPHABET = sorted(ByteLevel.alphabet())
"""The 256 characters that stand for bytes."""


def add_shape(writer: gguf.GGUFWriter) -> None:
    """The keys of a tiny model that configurations are made of."""
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(4)
    writer.add_layer_norm_rms_eps(1e-5)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_every_type(path: Path) -> None:
    """A file with values and arrays of every type, and tensors of six types, all aligned to 64 bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    types = gguf.GGUFValueType
    numbers = {
        types.UINT8: 250,
        types.INT8: -3,
        types.UINT16: 65000,
        types.INT16: -300,
        types.UINT32: 4_000_000_000,
        types.INT32: -70_000,
        types.FLOAT32: 0.1,
        types.UINT64: 2**63 + 1,
        types.INT64: -(2**62),
        types.FLOAT64: 0.1,
        types.BOOL: True,
    }
    for type, value in numbers.items():
        writer.add_key_value(f"one.{type.name}", value, type)
        writer.add_key_value(f"many.{type.name}", [value, value, value], types.ARRAY, type)
    writer.add_string("text.é", "naïve 日本 👩‍👩‍👧")
    writer.add_string("text.empty", "")
    writer.add_array("texts", ["", "a", "日本", "x" * 300])
    generator = np.random.default_rng(0)
    for name, type in (("a", "F32"), ("b", "F16"), ("c", "Q8_0"), ("d", "Q4_0"), ("e", "BF16")):
        dense = generator.standard_normal((3, 5, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[type]
        writer.add_tensor(name, gguf.quants.quantize(dense, kind), raw_dtype=kind)
    writer.add_tensor("f", np.arange(7, dtype=np.int32))
    finish(writer)


def write_bpe(path: Path, architecture: str, pre: str | None, **more: Any) -> None:
    """A byte-level BPE tokenizer: all bytes, a few merges, a control token, a user-defined one, BOS, EOS, PAD."""
    writer = gguf.GGUFWriter(path, architecture)
    add_shape(writer)
    words = ["12", "zz", "Ġa", "Ġthe", "th", "the", "Ġt", "Ġth", "Ã©", "'s"]
    merges = ["1 2", "z z", "Ġ a", "t h", "th e", "Ġ t", "Ġt h", "Ġth e", "Ã ©", "' s"]
    tokens = [*ALPHABET, *words, "<think>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 4) + [4, 3, 3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_add_bos_token(bool(more.get("add_bos", False)))
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    finish(writer)


def write_sentencepiece(path: Path, architecture: str) -> None:
    """A SentencePiece BPE tokenizer without merges: bytes, pieces with scores, control tokens."""
    writer = gguf.GGUFWriter(path, architecture)
    add_shape(writer)
    pieces = ["▁", *"abcdehilmnorstuwyz.,'1234", "th", "he", "▁t", "▁th", "▁the", "the", "▁a", "er", "▁h", "ll", "▁▁"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    if architecture.startswith("gemma"):
        tokens[-1] = "  "  # as Gemma's files spell it
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * len(pieces))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(not architecture.startswith("gemma"))
    finish(writer)


TEXTS = [
    "the  other 1212 hello, the 12.",
    "  leading and trailing  ",
    "\n\ttabs\r\n",
    "e\u0301 é naïve 日本 👩‍👩‍👧 \u200b",
    "<|im_start|>the<|im_end|> <think>zz</think> <bos>a<eos>",
    "",
    "don't the's 'S 123456",
]


def pair_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order of a query or key weight in GGUF: rotary pairs side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    pre: str | None,
    more: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> None:
    """A GGUF file of a tiny LLaMA with float32 weights and a byte-level tokenizer with the merge "1 2".

    `more` may write more keys and tensors.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(ByteLevel.alphabet())
    tokens += ["12", "zz", "<bos>", "<eos>"]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * 2)
    writer.add_token_merges(["1 2", "z z"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(259)
    writer.add_chat_template("{% for message in messages %}<bos>{{ message['content'] }}<eos>{% endfor %}")
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{i}.{ours}.weight"]
            if theirs == "attn_q":
                weight = pair_rotary(weight, config.num_attention_heads)
            elif theirs == "attn_k":
                weight = pair_rotary(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight.contiguous().numpy())
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
