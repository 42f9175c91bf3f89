"""What a model passes to its blocks besides the hidden states, recorded once and given again to any number of windows.

Legend: b windows, T tokens a window, d hidden size.

All calibration windows are full, so masks and positions are the same for each; what a model makes for two windows is
what it makes for one, given twice. Three short passes over one and over two windows show how each argument follows the
number of windows (ALiBi has a slab for every window and head), and that blocks run by themselves give what the model
itself computes. The arguments of full length are then recorded without running any block.
"""

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lit_binq.errors import LitBinqError

SHORT = 16
"""Tokens of the passes that compare blocks with the model: long enough to tell masks apart, quick for any model."""

TOLERANCE = 1e-4
"""Relative difference of a block by itself from the same block in the model: float32 rounds some 1e-6 off."""

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class Stop(Exception):
    """Ends a forward pass early; never leaves the function that registered its hook."""


class hooked:
    """Context manager that removes a hook."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@dataclass(frozen=True)
class PerWindow:
    """A tensor that has an equal part for every window.

    Attributes:
        part: what one window gets.
        dim: the dimension along which the parts of several windows lie.
        interleaved: whether the parts lie entry by entry instead of one behind the other.
    """

    part: Tensor
    dim: int
    interleaved: bool = False

    def of(self, windows: int) -> Tensor:
        """The tensor for so many windows; a view where each has one entry."""
        size = list(self.part.shape)
        if size[self.dim] == 1:
            return self.part.expand(*size[: self.dim], windows, *size[self.dim + 1 :])
        if self.interleaved:
            return self.part.repeat_interleave(windows, self.dim)
        return self.part.repeat(*[windows if d == self.dim else 1 for d in range(len(size))])


@dataclass
class BlockCall:
    """Arguments a model passes to one block besides the hidden states; `PerWindow` where they follow the windows."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> "BlockCall":
        """The same arguments with every tensor on `device`."""
        return self.map(lambda t: t.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "BlockCall":
        """The same arguments with `function` applied to every tensor."""

        def apply(leaf: Any) -> Any:
            if isinstance(leaf, PerWindow):
                return PerWindow(function(leaf.part), leaf.dim, leaf.interleaved)
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return BlockCall(_map(self.args, apply), _map(self.kwargs, apply))

    def of(self, windows: int) -> "BlockCall":
        """The arguments for so many windows, tensors only."""
        return BlockCall(_for_windows(self.args, windows), _for_windows(self.kwargs, windows))


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """A nested value with `function` applied to everything but tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        made = [_map(v, function) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    return function(value)


def _for_windows(value: Any, windows: int) -> Any:
    return _map(value, lambda leaf: leaf.of(windows) if isinstance(leaf, PerWindow) else leaf)


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """One block's output: (b, T, d) -> (b, T, d)."""
    call = call.of(len(hidden))
    return _first(block(hidden, *call.args, **call.kwargs))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def capture_calls(model: PreTrainedModel, blocks: nn.ModuleList, window: Tensor) -> list[BlockCall]:
    """The arguments the model passes to each block, for any number of windows like `window`.

    Args:
        model: in evaluation mode.
        blocks: its decoder blocks.
        window: (1, T) int64.

    Raises:
        LitBinqError: blocks that the model does not run once each one behind the other, arguments that depend on the
            tokens or in another way on the number of windows, or a block that by itself computes something else.
    """
    # The same tokens in another place: what depends on them differs.
    pair = torch.cat((window, window.roll(1, 1)))
    short = _record(model, blocks, pair[:, :SHORT])
    _require_chain(model, short)
    # Blocks whose outputs are nothing but hidden states need not run for what the model passes on.
    like = short if all(isinstance(r.output, Tensor) or all(v is None for v in r.output[1:]) for r in short) else None
    one = _record(model, blocks, pair[:1, :SHORT], like)
    calls = [_merge(a.call, b.call, model) for a, b in zip(one, short, strict=True)]
    _require_blocks(model, blocks, short, calls)
    if window.shape[1] <= SHORT:
        return calls
    longer = [_record(model, blocks, windows, like) for windows in (pair[:1], pair)]
    return [_merge(a.call, b.call, model) for a, b in zip(*longer, strict=True)]


@dataclass
class _Pass:
    """A block's part of a forward pass: what it got and what it put out."""

    hidden: Tensor
    call: BlockCall
    output: Any = None


def _record(
    model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor, like: list[_Pass] | None = None
) -> list[_Pass]:
    """One forward pass over `windows` (b, T).

    Args:
        model: the model.
        blocks: its blocks.
        windows: int64.
        like: an earlier pass; blocks then hand their input on, in the form of their output there, and
            compute nothing; the pass ends at the last one.
    """
    passes: list[_Pass] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.append(_Pass(*_split(block, args, kwargs)))
        if like is not None and len(passes) == len(blocks):
            raise Stop

    def after(_: nn.Module, __: Any, output: Any) -> None:
        passes[-1].output = output

    with ExitStack() as stack, torch.no_grad(), suppress(Stop):
        for i, block in enumerate(blocks):
            stack.enter_context(hooked(block.register_forward_pre_hook(before, with_kwargs=True)))
            if like is None:
                stack.enter_context(hooked(block.register_forward_hook(after)))
            else:
                stack.enter_context(_handing_on(block, like[i].output, passes))
        model(input_ids=windows, use_cache=False)
    if len(passes) != len(blocks):
        raise LitBinqError(
            f"{type(model).__name__} ran {len(passes)} of its {len(blocks)} blocks in one pass, expected each once: "
            "this architecture is not supported, change the option `model`"
        )
    return passes


@contextmanager
def _handing_on(block: nn.Module, output: Any, passes: list[_Pass]) -> Iterator[None]:
    """A block that returns the hidden states it got, in the form of `output`."""

    def forward(*_: Any, **__: Any) -> Any:
        hidden = passes[-1].hidden
        return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

    before = block.__dict__.get("forward")
    object.__setattr__(block, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            object.__setattr__(block, "forward", before)


def _split(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Hidden states and all other arguments, by name where the block's signature has names; caches left out."""
    parameters = inspect.signature(type(block).forward).parameters  # the block's own may be replaced, see _handing_on
    by_name = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    rest: tuple[Any, ...] = ()
    if by_name and len(args) <= len(by_name):
        named = {**dict(zip((p.name for p in by_name), args, strict=False)), **kwargs}
        hidden = named.pop(by_name[0].name)
    else:
        hidden, rest, named = args[0] if args else kwargs["hidden_states"], args[1:], dict(kwargs)
        named.pop("hidden_states", None)
    kept: dict[str, Any] = {k: v for k, v in named.items() if k not in _CACHES and not isinstance(v, Cache)}
    if "use_cache" in named or "use_cache" in parameters:
        kept["use_cache"] = False
    return hidden, BlockCall(tuple(None if isinstance(value, Cache) else value for value in rest), kept)


def hidden_states(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    return _split(block, args, kwargs)[0]


def _merge(one: BlockCall, two: BlockCall, model: PreTrainedModel) -> BlockCall:
    """What one window and what two of other tokens get, as arguments for any number of windows."""
    if one.kwargs.keys() != two.kwargs.keys() or len(one.args) != len(two.args):
        raise _odd(model, "arguments whose number depends on the windows")
    args = tuple(_merged(a, b, model) for a, b in zip(one.args, two.args, strict=True))
    return BlockCall(args, {k: _merged(v, two.kwargs[k], model) for k, v in one.kwargs.items()})


def _merged(a: Any, b: Any, model: PreTrainedModel) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _merged_tensors(a, b, model)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        made = [_merged(x, y, model) for x, y in zip(a, b, strict=True)]
        return type(a)(*made) if hasattr(a, "_fields") else type(a)(made)
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {k: _merged(v, b[k], model) for k, v in a.items()}
    simple = (type(None), bool, int, float, str, Tensor, tuple, list, dict)
    if (isinstance(a, simple) or isinstance(b, simple)) and not (type(a) is type(b) and a == b):
        raise _odd(model, "arguments that depend on the number of windows")
    return a


def _merged_tensors(a: Tensor, b: Tensor, model: PreTrainedModel) -> Tensor | PerWindow:
    if _alike(a, b):
        return a
    if a.dim() == b.dim():
        differing = [d for d in range(a.dim()) if a.shape[d] != b.shape[d]]
        # Where sizes are alike a tensor may still hold another value: then it depends on the tokens.
        if len(differing) == 1 and b.shape[differing[0]] == 2 * a.shape[differing[0]]:
            for interleaved in (False, True):
                rule = PerWindow(a, differing[0], interleaved)
                if _alike(rule.of(2), b):
                    return rule
    raise _odd(
        model,
        "arguments that depend on the tokens (per-layer embeddings, say), expected the same for every window",
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    """The same values, but for rounding: a product may be summed in another order for two windows."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def _odd(model: PreTrainedModel, what: str) -> LitBinqError:
    return LitBinqError(
        f"{type(model).__name__} passes its blocks {what}: this architecture is not supported, "
        "change the option `model`"
    )


def _require_chain(model: PreTrainedModel, passes: list[_Pass]) -> None:
    """Refuse models that do something between their blocks."""
    for i, (now, following) in enumerate(itertools.pairwise(passes)):
        if not _close(following.hidden, _first(now.output)):
            raise LitBinqError(
                f"{type(model).__name__} gives block {i + 1} something else than what block {i} put out, expected "
                "blocks one behind the other: this architecture is not supported, change the option `model`"
            )


def _require_blocks(model: PreTrainedModel, blocks: nn.ModuleList, passes: list[_Pass], calls: list[BlockCall]) -> None:
    """Run one block of each kind by itself on two windows and compare with the model's own pass.

    Raises:
        LitBinqError: a block fails or computes something else.
    """
    seen: set[Hashable] = set()
    for i, (block, made, call) in enumerate(zip(blocks, passes, calls, strict=True)):
        kind = kind_of(block, call)
        if kind in seen:
            continue
        seen.add(kind)
        wrong = f"{type(model).__name__}: block {i} ({type(block).__name__}) by itself"
        hint = "expected the model's own hidden states: this architecture is not supported, change the option `model`"
        try:
            with torch.no_grad():
                output = run_block(block, made.hidden, call)
        except Exception as error:  # whatever a model's own code makes of arguments it does not expect
            line = " ".join(str(error).split())[:160]
            raise LitBinqError(f"{wrong} fails ({type(error).__name__}: {line}); {hint}") from error
        if not _close(output, _first(made.output)):
            raise LitBinqError(f"{wrong} gives other hidden states for two windows, {hint}")


def kind_of(block: nn.Module, call: BlockCall) -> Hashable:
    """Blocks of one kind have the same modules and shapes, and get arguments of the same shapes."""
    shapes = tuple(t.shape for t in (*block.parameters(), *block.buffers()))
    return type(block), tuple((name, type(m)) for name, m in block.named_modules()), shapes, _form(call)


def _form(call: BlockCall) -> str:
    """The arguments' names and shapes, without their values."""

    def form(leaf: Any) -> Any:
        if isinstance(leaf, PerWindow):
            return ("window", tuple(leaf.part.shape), leaf.dim)
        return tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__

    return repr(_map((call.args, call.kwargs), form))


def _close(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    scale = torch.linalg.vector_norm(b.double())
    return bool(torch.linalg.vector_norm(a.double() - b.double()) <= TOLERANCE * scale)
