"""config.json and generation_config.json of a packed folder.

config.json states what the model in memory is, also where that is not what its source's stated: whether a head is tied
(lit_binq.models.ties), which attention function computes. It names a quantization method, so that programs that know
such methods refuse the folder. transformers only warns of a method that it does not know, and would go on to fill every
packed linear with random numbers; so the configuration also names a weights file that is none, and says with its name
which package reads the folder. Releases before 5 look at the weights file's own format instead (`FORMAT`).
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.models.kv_cache import plain_attention
from lit_binq.models.ties import FLAG, state_ties
from lit_binq.utils.files import quoted

METHOD = "lit_binq"
"""`quantization_config.quant_method`."""

REFUSAL = "packed by lit_binq: load this folder with lit_binq.hub.load_packed of the Python package lit-binq"
"""What transformers quotes when it refuses the folder; it must not end in .safetensors."""

FORMAT = {"format": "lit_binq"}
"""Metadata of the weights file; transformers writes {"format": "pt"}."""

_LOADING = ("architectures", "dtype", "transformers_version", "_name_or_path", "name_or_path", "model_type")
"""Keys of a configuration that are not the model's."""

_OURS = ("quantization_config", "transformers_weights")


def write_configuration(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and generation_config.json, free of the traces of how the model was loaded.

    The flag `tie_word_embeddings` of the model's own configuration is set to what the model does (`state_ties`).
    """
    state_ties(model)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32  # what load_packed computes with
    values: dict[str, Any] = json.loads(config.to_json_string())
    if hasattr(config, FLAG):  # also where it is the default: another release may have another
        values[FLAG] = getattr(config, FLAG)
    attention = plain_attention(str(config._attn_implementation))
    if attention in ("eager", "sdpa"):  # transformers writes none, and chooses again when it loads
        values["attn_implementation"] = attention
    values |= {"quantization_config": {"quant_method": METHOD}, "transformers_weights": REFUSAL}
    text = json.dumps(values, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if model.generation_config is not None:
        # Not its own `save_pretrained`: that refuses settings that contradict each other, temperature without sampling
        # say, which published models have.
        text = model.generation_config.to_json_string(keys_to_pop=["compile_config"])
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def require_kept_configuration(model: PreTrainedModel) -> None:
    """Make sure that the model's configuration is the same once it is written and read again.

    Logits of a few tokens would not tell what only matters further on: a sliding window, the scaling of angles.

    Raises:
        LitBinqError: names a value that is not kept.
    """
    with tempfile.TemporaryDirectory() as place:
        write_configuration(model, Path(place))
        found = difference(model.config, read_configuration(Path(place)))
    if found:
        raise LitBinqError(
            f"{type(model).__name__}: its configuration does not survive being written: {found}; expected the same, "
            "change config.json of the option `model`"
        )


def difference(one: Any, other: Any) -> str:
    """A value in which two configurations differ, in words; nothing if they are one model's."""
    mine, theirs = (_facts(config.to_dict()) for config in (one, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            return f"{key} is {quoted(mine.get(key))}, read again {quoted(theirs.get(key))}"
    return ""


def _facts(value: Any) -> Any:
    """A configuration as JSON has it, without what says how a model is loaded."""
    if isinstance(value, dict):
        return {str(key): _facts(inner) for key, inner in value.items() if key not in _LOADING}
    if isinstance(value, (list, tuple)):
        return [_facts(inner) for inner in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def read_configuration(folder: Path) -> Any:
    """The model's configuration without what `write_configuration` added for other programs."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in _OURS:
        if hasattr(config, name):
            delattr(config, name)
    return config
