"""What a GGUF file states about its model and transformers passes over in silence: refused instead.

transformers makes the configuration from the keys it knows and drops every tensor that its model has no place for. A
file with rotary factors, scaled rotary embeddings, a sliding window or biases then becomes another model, which loads,
runs and writes plausible text.
"""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.models.gguf_files import GgufHead


def tensors_left_out(head: GgufHead, model: PreTrainedModel) -> list[str]:
    """Names of the file's tensors that transformers has dropped; none where its loader reports them itself.

    Args:
        head: the file's.
        model: what became of it.
    """
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError:  # a version without the loader that drops them
        return []
    architecture = head.get("general.architecture")
    if is_gguf_arch_supported(architecture):
        return []
    taken = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)())
    return [tensor.name for tensor in head.tensors if tensor.name not in taken]


def require_stated(head: GgufHead, config: PreTrainedConfig) -> None:
    """Compare the configuration with what the file states about positions.

    Raises:
        LitBinqError: the configuration lacks scaled rotary embeddings, a share of rotated dimensions or a sliding
            window that the file states.
    """
    architecture = head.get("general.architecture")

    def stated(key: str) -> Any:
        return head.get(f"{architecture}.{key}")

    ropes = _ropes(config)
    scaling, factor = stated("rope.scaling.type"), stated("rope.scaling.factor") or stated("rope.scale_linear")
    scaled = (scaling not in (None, "none") and factor != 1) or factor not in (None, 0, 1)
    if scaled and all(rope.get("rope_type", "default") == "default" for rope in ropes):
        _refuse(head, f"rotary embeddings scaled by {scaling or 'linear'} {factor}")
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    rotated = stated("rope.dimension_count")
    if rotated and width and ropes:
        shares = {rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) for rope in ropes}
        if rotated not in {int(width * (1.0 if share is None else share)) for share in shares}:
            _refuse(head, f"{rotated} rotated dimensions of {width} a head")
    window, context = stated("attention.sliding_window"), stated("context_length")
    if window and window < (context or window + 1) and getattr(config, "sliding_window", None) != window:
        _refuse(head, f"a sliding window of {window} tokens")


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of every kind of layer; none for a model without rotary embeddings."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)]
    return kinds or ([parameters] if parameters else [])


def _refuse(head: GgufHead, what: str) -> None:
    raise LitBinqError(
        f"GGUF file {str(head.path)!r} cannot be loaded: it states {what}, which transformers does not take from GGUF "
        f"files of {head.get('general.architecture')}; expected what it does take: give the model's Hugging Face "
        "folder instead"
    )
