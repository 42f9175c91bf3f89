"""What export cannot carry, known from a model's configuration and modules, before anything is computed.

Asked by export first of all, and before a fit: that is why it is not part of the export. The model may be full
precision or packed, with or without weights (torch's meta device). Milliseconds.
"""

import inspect
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lit_binq.models.rotary import DEPENDENT, dependent_modules, rope_parameters

KEPT = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of blocks (`layer_types` of a configuration) that keep keys and values and nothing else."""

ELSEWHERE = "fit, validate and everything else in torch do not need it"


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why `litbinq export` cannot make this model, in one sentence that names the reason; None if it seems to.

    None is no promise: what torch cannot trace for another reason is told by the export itself.
    """
    for ask in (_state, _shared_cache, _arguments, _complex, _experts, _angles):
        reason = ask(model)
        if reason is not None:
            return f"{type(model).__name__} {reason}: {ELSEWHERE}"
    return None


def _config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _state(model: PreTrainedModel) -> str | None:
    """Recurrent states and convolutions beside or instead of keys and values."""
    config = _config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    other = sorted({str(kind) for kind in kinds} - set(KEPT))
    if other:
        return (
            f"has blocks of kind {', '.join(other)}, which keep a state of their own; export carries keys and values "
            "only"
        )
    if getattr(model, "_is_stateful", False):
        return "keeps a recurrent state from token to token; export carries keys and values only"
    return None


def _shared_cache(model: PreTrainedModel) -> str | None:
    """Blocks that read the keys and values of other blocks."""
    config = _config(model)
    shared = int(getattr(config, "num_kv_shared_layers", None) or 0)
    modes = getattr(config, "kv_sharing_modes", None) or ()
    if shared or any(mode == "reuse" for mode in modes):
        return "has blocks that read other blocks' keys and values; export expects a cache for every block"
    return None


def _arguments(model: PreTrainedModel) -> str | None:
    """A cache that goes in and out under the usual name."""
    parameters = inspect.signature(type(model).forward).parameters
    if "past_key_values" not in parameters:
        return "takes no past_key_values, so it has no cache of the usual kind that export could carry"
    return None


def _complex(model: PreTrainedModel) -> str | None:
    """Rotary embeddings in complex numbers, which ONNX does not have."""
    source = sys.modules.get(type(model).__module__)
    try:
        text = "" if source is None else inspect.getsource(source)
    except (OSError, TypeError):  # a class that was made without a file
        return None
    if "view_as_complex(" in text or "torch.polar(" in text:
        return "computes its rotary embedding in complex numbers, which ONNX does not have"
    return None


def _experts(model: PreTrainedModel) -> str | None:
    """Experts whose weights are one tensor of three axes."""
    for name, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        if isinstance(module, nn.Module) and "experts" in name and any(p.dim() == 3 for _, p in own):
            return f"has its experts in one tensor ({name}), whose product ONNX does not have"
    return None


def _angles(model: PreTrainedModel) -> str | None:
    """Rotary embeddings that depend on the length of the text in a way that is not known here."""
    wanted = [str(p.get("rope_type", "default")) for _, p in rope_parameters(model.config)]
    kinds = [kind for kind in wanted if kind in DEPENDENT or kind not in ("default", *ROPE_INIT_FUNCTIONS)]
    for kind in kinds:
        if kind not in DEPENDENT:
            return f"has the rotary embedding {kind!r}, which export does not know"
        modules = dependent_modules(model).values()
        known = all(hasattr(type(m).forward, "__wrapped__") and hasattr(m, "config") for m in modules)
        if not modules or not known:
            return f"has the rotary embedding {kind!r}, whose angles depend on the text's length, in a form of its own"
    return None
