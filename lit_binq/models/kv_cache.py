"""Keys and values at 4 bits: what a quantized key-value cache does to a model, in any Hugging Face causal model.

Legend: b windows, T tokens, h key-value heads, d head size.

Every key and every value of a head is quantized by itself, token by token, to asymmetric INT4:

    lo = min, step = (max - lo) / 15, q = round((t - lo) / step) in 0..15, t^ = lo + step q      over the d entries

They are quantized where the model's own attention takes them: keys behind the rotary embedding (and behind a norm of
heads, where there is one), which is where transformers' cache stores them. Since a token's codes depend on that token
alone, this is the same as quantizing on entry into the cache. So perplexities are those of a 4-bit cache, while
memory is not yet saved: the cache itself still holds what comes in. Source: arXiv 2504.05352 names a 4-bit cache; how
it is grouped is ours.

How: transformers looks an attention function up by the name in the model's configuration. For each such name there is
another, whose function quantizes keys and values and then calls the one that was configured; masks are made as for that
one. Setting the name in the configurations that attention modules read is all that changes in a model.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lit_binq.errors import LitBinqError

KV_BITS = (0, 4)
"""0: as the model computes them."""

_PREFIX = "lit_binq_kv4_"

_called: list[nn.Module] = []
"""Attention modules whose keys and values were quantized, while `require_kv` watches."""

_watching: list[bool] = []


class _StraightThrough(torch.autograd.Function):
    """`quantize_heads` with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return _nearest(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _nearest(t: Tensor) -> Tensor:
    x = t.float()
    lo = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - lo) / 15
    q = torch.where(step > 0, (x - lo) / step, 0.0).round()
    return (lo + step * q).to(t.dtype)


def quantize_heads(t: Tensor) -> Tensor:
    """Keys or values (..., d), each token and head quantized by itself; the same dtype, computed in float32.

    The gradient passes on as it is (straight-through). Neither synchronizes with a device nor has a shape that depends
    on data.
    """
    # Without gradients in standard operators only, so that an exporter can follow.
    return _StraightThrough.apply(t) if torch.is_grad_enabled() and t.requires_grad else _nearest(t)


def set_kv_bits(module: nn.Module, bits: int) -> None:
    """Quantize keys and values from now on, or no longer, in a model or a block.

    All modules that read the same configuration object change with it, so a block should be a deep copy.

    Args:
        module: the model, or one of its blocks.
        bits: 0 or 4.

    Raises:
        LitBinqError: other bits.
    """
    if bits not in KV_BITS:
        raise LitBinqError(f"kv_bits: got {bits}, expected one of {', '.join(map(str, KV_BITS))}")
    # All names first: setting a configuration's sets those of its parts too.
    wanted = [(config, plain_attention(config._attn_implementation)) for config in _configurations(module)]
    for config, base in wanted:
        config._attn_implementation = _register(base) if bits else base


def kv_bits(module: nn.Module) -> int:
    """4 if a model's or block's keys and values are quantized, else 0."""
    return 4 * any(c._attn_implementation.startswith(_PREFIX) for c in _configurations(module))


def _configurations(module: nn.Module) -> Iterator[Any]:
    """Every configuration that names an attention function and that a module inside `module` reads, each once."""
    seen: set[int] = set()
    for m in module.modules():
        config = getattr(m, "config", None)
        parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ())]
        for part in parts:
            if id(part) not in seen and isinstance(getattr(part, "_attn_implementation", None), str):
                seen.add(id(part))
                yield part


def plain_attention(name: str) -> str:
    """The attention function behind a name in a configuration, keys and values as they are."""
    return name.removeprefix(_PREFIX)


def _register(base: str) -> str:
    """Make the quantizing variant of an attention function known to transformers; returns its name."""
    name, functions, masks = _PREFIX + base, AttentionInterface(), AttentionMaskInterface()
    if name not in functions:
        functions.register(name, _quantizing(base))
    if base in masks and name not in masks:
        masks.register(name, masks[base])
    return name


def _quantizing(base: str) -> Callable[..., Any]:
    """The attention function `base` on quantized keys and values."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _watching:
            _called.append(module)
        function = _eager(module) if base == "eager" else AttentionInterface()[base]
        return function(module, query, quantize_heads(key), quantize_heads(value), *args, **kwargs)

    return attention


def _eager(module: nn.Module) -> Callable[..., Any]:
    """A model's own eager attention: it stands beside the attention's class, or beside one that it was derived from."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise LitBinqError(
        f"kv_bits: {type(module).__name__} has no eager attention function of the usual name; expected one: set "
        "kv_bits: 0"
    )


@torch.no_grad()
def require_kv(model: nn.Module, blocks: nn.ModuleList, window: Tensor) -> None:
    """Make sure that `set_kv_bits` reaches every block of a model: some have attention of their own.

    Args:
        model: with quantized keys and values.
        blocks: its decoder blocks.
        window: (1, T) int64, one forward pass is made over it.

    Raises:
        LitBinqError: a block without attention through transformers' interface.
    """
    _watching.append(True)
    try:
        model(input_ids=window, use_cache=False)
        reached = {id(m) for m in _called}
    finally:
        _watching.pop()
        _called.clear()
    for i, block in enumerate(blocks):
        if not any(id(m) in reached for m in block.modules()):
            raise LitBinqError(
                f"kv_bits: block {i} of {type(model).__name__} does not attend through transformers' attention "
                "interface, expected every block to: set kv_bits: 0"
            )
