"""An exported folder that onnxruntime-genai runs: its configuration and, beside it, our operator library.

onnxruntime-genai is no dependency: this writes files. It loads custom operators through the key
`model.decoder.session_options.custom_ops_library` and only from within the model's folder, so the library is copied
there; without one the function bodies run. It drives the fused graph with its cache in one buffer, as we do, and the
traced graph with a cache that grows.

A folder written this way belongs to machines of one kind (operating system, processor). `generate` and `check` work
on it as on any other.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import write_json
from lit_binq_onnx.runtime.library import HOW_TO_BUILD, library_path
from lit_binq_onnx.runtime.session import FUSED, MODEL

log = logging.getLogger(__name__)

CONFIG = "genai_config.json"

MODEL_TYPES = ("gemma", "gemma2", "granite", "llama", "mistral", "olmo", "phi", "phi3", "qwen2", "qwen3", "smollm3")
"""Types that onnxruntime-genai runs as a plain decoder; they choose nothing more, so any other is called "decoder"."""


def _first(value: Any) -> Any:
    """A special token's number, where a configuration gives a list the first."""
    return value[0] if isinstance(value, list) else value


def require_uniform(cache_shapes: list[tuple[int, int]]) -> None:
    """Refuse a model whose blocks keep caches of several shapes: the configuration has one number for all of them.

    Raises:
        LitBinqError: they differ.
    """
    if len(set(cache_shapes)) > 1:
        shapes = ", ".join(f"{heads} heads of {size}" for heads, size in dict.fromkeys(cache_shapes))
        raise LitBinqError(
            f"target: got 'genai' with blocks of several cache shapes ({shapes}), expected 'ort': onnxruntime-genai "
            "takes one for all blocks"
        )


def genai_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_shapes: list[tuple[int, int]],
    *,
    fused: bool,
    library: str | None,
) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
        model: the exported model.
        tokenizer: its tokenizer.
        cache_shapes: (heads, head_dim) of every cache tensor.
        fused: whether the fused graph is to be run.
        library: name of the operator library in the folder, or None.
    """
    config = model.config.get_text_config(decoder=True)
    chosen = model.generation_config
    ends = getattr(chosen, "eos_token_id", None)
    ends = config.eos_token_id if ends is None else ends
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = next(
        (
            p
            for p in (getattr(chosen, "pad_token_id", None), config.pad_token_id, tokenizer.pad_token_id)
            if p is not None
        ),
        _first(ends),
    )
    length = getattr(config, "max_position_embeddings", None) or 2048
    heads, head_dim = cache_shapes[0]
    # The optional input of the fused graph makes ONNX Runtime warn that it folds less: nothing a user could act on.
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    if not fused:
        inputs["position_ids"] = "position_ids"
    kind = config.model_type
    return {
        "model": {
            "type": kind if kind in MODEL_TYPES else "decoder",
            "bos_token_id": _first(config.bos_token_id) if config.bos_token_id is not None else _first(ends),
            "eos_token_id": ends,
            "pad_token_id": pad,
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": options,
                "filename": FUSED if fused else MODEL,
                "head_size": head_dim,
                "hidden_size": config.hidden_size,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(cache_shapes) // 2,
                "num_key_value_heads": heads,
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": fused,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def write_genai(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_shapes: list[tuple[int, int]],
    *,
    fused: bool,
) -> None:
    """Write genai_config.json into an exported folder and copy the operator library there.

    Args:
        folder: an exported folder with its tokenizer.
        model: the exported model.
        tokenizer: its tokenizer.
        cache_shapes: (heads, head_dim) of every cache tensor.
        fused: whether there is a fused graph to be run.
    """
    path = library_path()
    if path is None:
        log.warning("target genai: no operator library to copy, the function bodies will run: slower; %s", HOW_TO_BUILD)
    else:
        shutil.copy2(path, folder / path.name)
    library = None if path is None else path.name
    write_json(folder / CONFIG, genai_config(model, tokenizer, cache_shapes, fused=fused, library=library))
