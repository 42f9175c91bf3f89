"""Attention maps of one block of any Hugging Face model, without knowing how it computes them.

Fused attention never forms the probabilities; the `eager` implementation of a model returns them as the second
output of its attention module. So a block runs once more with `eager` switched on in its configuration, and every
submodule that returns something which looks like attention maps is listened to. Where that does not work (no such
output, or eager attention computes something else), the caller is told why.

Legend: T tokens of the window, heads attention heads, d hidden size.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_binq.models.blocks import BlockCall, run_block
from lit_binq.models.kv_cache import kv_bits, set_kv_bits


class NoAttentionMaps(Exception):
    """A block gives no attention maps; the message says why."""


def attention_maps(
    block: nn.Module, hidden: Tensor, call: BlockCall, output: Tensor | None = None
) -> dict[str, Tensor]:
    """The attention maps of a block on one window.

    Args:
        block: a decoder block in evaluation mode.
        hidden: (1, T, d).
        call: the block's other arguments, as the model passes them to its own attention implementation.
        output: (1, T, d), what the block puts out with that implementation; if given, eager attention must agree.

    Returns:
        (1, heads, T, T) by name of the attention module; rows sum to one.

    Raises:
        NoAttentionMaps: no module returns maps, or eager attention gives another output.
    """
    maps: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, out: Any) -> None:
            found = [t for t in out if _is_map(t, hidden.shape[1])] if isinstance(out, (tuple, list)) else []
            # Wrappers hand the same tensor on; the innermost module, whose hook runs first, names it.
            if found and all(found[0] is not kept for kept in maps.values()):
                maps[name] = found[0]

        return note

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_eager(block))
        for name, module in block.named_modules():
            handle = module.register_forward_hook(hook(name))
            stack.callback(handle.remove)
        eager_call = _eager_call(block, call, hidden)
        try:
            eager = run_block(block, hidden, eager_call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code makes of an implementation it was not made for
            raise NoAttentionMaps(f"eager attention fails ({' '.join(str(error).split())[:120]})") from error
    if not maps:
        raise NoAttentionMaps("no module of the block returns attention maps under eager attention")
    if output is not None:
        difference = torch.linalg.vector_norm(eager - output) / torch.linalg.vector_norm(output).clamp_min(1e-30)
        if not difference < 1e-3:
            raise NoAttentionMaps(f"eager attention changes the block's output by {float(difference):.1e} of its norm")
    return maps


def _is_map(value: Any, T: int) -> bool:
    """Whether a value looks like attention maps: (1, heads, T, T), nothing negative, rows that sum to one."""
    if not (isinstance(value, Tensor) and value.dim() == 4 and value.shape[-2:] == (T, T)):
        return False
    rows = value.sum(-1)
    return bool((value >= 0).all()) and torch.allclose(rows, torch.ones_like(rows), atol=1e-2)


@contextmanager
def _eager(block: nn.Module) -> Iterator[None]:
    """Eager attention in every configuration that the block's modules read, for a while; quantized keys stay so."""
    bits = kv_bits(block)
    before: list[tuple[Any, Any]] = []
    for config in {id(c): c for m in block.modules() if (c := getattr(m, "config", None)) is not None}.values():
        parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]
        before += [(c, c._attn_implementation) for c in parts if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        set_kv_bits(block, bits)
        yield
    finally:
        for config, value in before:  # a configuration before its parts, because setting it sets them too
            config._attn_implementation = value


def _eager_call(block: nn.Module, call: BlockCall, hidden: Tensor) -> BlockCall:
    """The call with a mask that eager attention understands: added to the scores.

    Fused attention is told to be causal by no mask at all, or gets a mask of booleans (true: attend).
    """
    call = call.of(len(hidden))
    parameters = list(inspect.signature(block.forward).parameters)
    place = parameters.index("attention_mask") - 1 if "attention_mask" in parameters else len(call.args)
    args, kwargs = list(call.args), dict(call.kwargs)
    if place < len(args):
        args[place] = _additive(args[place], hidden)
    elif "attention_mask" in kwargs or "attention_mask" in parameters:
        kwargs["attention_mask"] = _additive(kwargs.get("attention_mask"), hidden)
    return BlockCall(tuple(args), kwargs)


def _additive(mask: Any, hidden: Tensor) -> Tensor:
    """A mask as numbers to add, (1, 1, T, T); None is causal."""
    T = hidden.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=hidden.device).tril()
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise NoAttentionMaps(f"an attention mask of kind {type(mask).__name__} cannot be given to eager attention")
    if mask.dtype != torch.bool:
        return mask
    numbers = torch.zeros(mask.shape, device=hidden.device, dtype=hidden.dtype)
    return numbers.masked_fill(~mask, torch.finfo(hidden.dtype).min)
