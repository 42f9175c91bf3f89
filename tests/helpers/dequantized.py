"""A packed folder read without the project: plain transformers, weights multiplied out from the stored bytes."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def row_column_weight(codes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """diag(rows) B diag(columns): a set bit is +1, least significant bit first, rows padded to whole bytes."""
    bits = np.unpackbits(codes, axis=1, bitorder="little")[:, : len(columns)].astype(np.float32)
    return (2 * bits - 1) * rows.astype(np.float32)[:, None] * columns.astype(np.float32)[None, :]


def dense_model(packed: Path) -> PreTrainedModel:
    """The dense float32 model that a packed folder of row x column layers stands for."""
    facts = json.loads((packed / "lit_binq.json").read_text())
    state = {
        name: t.float() if t.is_floating_point() else t for name, t in load_file(packed / "model.safetensors").items()
    }
    for name, entry in facts["linears"].items():
        assert entry["format"] == "row_column"
        parts = [state.pop(f"{name}.{part}").numpy() for part in ("codes", "row_scale", "col_scale")]
        state[f"{name}.weight"] = torch.from_numpy(row_column_weight(*parts))
    config = AutoConfig.from_pretrained(packed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= set(facts["tied"])
    assert unexpected == []
    model.tie_weights()
    return model
