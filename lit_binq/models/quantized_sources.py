"""Checkpoints whose weights are quantized already: made dense while they are read, or refused by their configuration.

transformers widens FP8 and MXFP4 by itself, on any machine; other methods need packages of their own, and kernels of a
GPU, so their checkpoints are refused at once.
"""

from typing import Any

import torch
from transformers import FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from lit_binq.errors import LitBinqError

_WIDENED: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Name of a method in config.json -> its configuration, which takes `dequantize`."""


def dequantizing(config: PreTrainedConfig, source: str) -> dict[str, Any]:
    """Options of `from_pretrained` that make a checkpoint's weights dense; none for one that is dense.

    Args:
        config: of the checkpoint.
        source: named in the error.

    Raises:
        LitBinqError: weights quantized by a method that is not widened here.
    """
    stated: Any = getattr(config, "quantization_config", None)
    if stated is None:
        return {}
    entries = dict(stated if isinstance(stated, dict) else stated.to_dict())
    method = str(getattr(entries.get("quant_method"), "value", entries.get("quant_method")))
    if method not in _WIDENED:
        raise LitBinqError(
            f"model {source!r}: its weights are quantized already (quantization_config: {method}), expected full "
            f"precision, {' or '.join(_WIDENED)}: name the checkpoint it was made from, or save it dequantized first"
        )
    return {"quantization_config": _WIDENED[method].from_dict({**entries, "dequantize": True})}


def forget_quantizer(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model whose weights were widened an ordinary one, in place.

    transformers leaves its quantizer on the model and on the configuration, where `save_pretrained` fails on both, and
    keeps tensors that were quantized in another dtype than the others.

    Args:
        model: loaded with the options of `dequantizing`, or from GGUF.
        dtype: of all parameters.
    """
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
