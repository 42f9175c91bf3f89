"""How much memory a computation holds at once, counted without making it: tensors of shape and dtype, but no content.

torch runs the operators on such tensors (its fake mode) and with them automatic differentiation, so what a backward
pass keeps is counted from the model's own code, whatever its architecture. Only what operators allocate inside
themselves is not seen.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators inside make and that are still held.

    Attributes:
        now: bytes held.
        peak: the most that was held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._add(t, made=False)  # it was there before: a view of it is nothing new
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t, made=True)
        return out

    def _add(self, t: Tensor, *, made: bool) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def without_content(value: Any) -> Any:
    """A tensor of the same shape and dtype without content, in the fake mode that is on; other values as they are."""
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def copy_without_content(module: nn.Module) -> nn.Module:
    """A copy of a module, its parameters and buffers without content. In the fake mode that is on."""
    made: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        empty = without_content(t)
        made[id(t)] = nn.Parameter(empty, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(module, made)


@contextmanager
def counting() -> Iterator[None]:
    """Tensors made inside have no content."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def step_bytes(loss: Callable[[], Tensor], autocast: torch.dtype | None) -> tuple[int, int, int]:
    """What a training step holds.

    Args:
        loss: makes the loss of tensors without content, with a gradient.
        autocast: the dtype of mixed precision; None is float32 throughout.

    Returns:
        Bytes kept for the backward pass, the most at once, and what is left afterwards: the gradients.
    """
    live = LiveBytes()
    with live:
        # The rules of the CPU's mixed precision stand for the device's.
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
            value = loss()
        kept = live.now
        value.backward()
        del value
    return kept, live.peak, live.now


def pass_bytes(forward: Callable[[], Any]) -> int:
    """The most that a pass without gradients holds at once, its result among it."""
    live = LiveBytes()
    with torch.no_grad(), live:
        result = forward()
        del result
    return live.peak
