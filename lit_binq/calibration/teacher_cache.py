"""The teacher's last hidden states, kept: they are the same in every epoch, and only its output head is left to run.

Legend: n windows, T tokens a window, d hidden size, V vocabulary; hidden (n, T, d) the input of the output head.

A full pass of the teacher is about a third of a step of the model stage; the logits themselves, (n, T, V), would be
far too large to keep. Only for models whose logits are head(hidden) and nothing else: those that cap or scale them
afterwards are found by comparing one window, and take the full pass.

Hidden states are stored in the dtype in which the head multiplies them, so nothing is lost: under autocast a linear
layer rounds its input to the autocast dtype first, and rounding twice is rounding once. Logits are then those of a full
pass over the same windows, bit for bit, up to what a device's matrix products make of another batch size.
"""

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DEVICE_SHARE = 4
"""The cache goes to the device if it takes at most one part in so many of the free memory there."""


class _Stop(Exception):
    """Ends a forward pass before the head; never leaves this file."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast in use on `device`; None without one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class TeacherCache:
    """Hidden states of all windows, computed once, under the autocast in use.

    Made by `cache_teacher`, which knows whether a model allows it.

    Args:
        head: the teacher's output head, on the device.
        hidden: (n, T, d), anywhere.
        device: where the head runs.
    """

    def __init__(self, head: nn.Module, hidden: Tensor, device: torch.device) -> None:
        self.head, self._hidden, self._device = head, hidden, device

    def hidden(self, rows: Tensor) -> Tensor:
        """(b, T, d) on the device, the head's input for windows `rows` (b,) int64."""
        return self._hidden[rows.to(self._hidden.device)].to(self._device)


@torch.no_grad()
def cache_teacher(teacher: PreTrainedModel, windows: Tensor, batch: int) -> TeacherCache | None:
    """Run the teacher over all windows and keep what its head gets.

    Args:
        teacher: full-precision model, on the device.
        windows: (n, T) int64 on the device.
        batch: windows a forward pass takes.

    Returns:
        The cache; None if head(hidden) is not, bit for bit, what the model returns for the first window, or if the
        model has no such head.
    """
    head, device = teacher.get_output_embeddings(), windows.device
    if not isinstance(head, nn.Module) or not len(windows):
        return None
    # What autocast makes of a linear layer's input; other heads keep what they are given.
    dtype = autocast_dtype(device) if isinstance(head, nn.Linear) else None
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0] if dtype is None else args[0].to(dtype))

    def catch_and_stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        catch(module, args)
        raise _Stop

    handle = head.register_forward_pre_hook(catch)
    try:
        logits = teacher(input_ids=windows[:1], use_cache=False).logits
    finally:
        handle.remove()
    # In float32, to which the loss widens them anyway; another shape is not equal.
    if len(caught) != 1 or not torch.equal(head(caught[0]).float(), logits.float()):
        log.debug("%s: its logits are not its head's output; the teacher runs whole", type(teacher).__name__)
        return None
    shape = (len(windows), *caught[0].shape[1:])
    store = torch.empty(shape, dtype=caught[0].dtype, device=_place(shape, caught[0], device))
    handle = head.register_forward_pre_hook(catch_and_stop)
    try:
        for i in range(0, len(windows), batch):
            with suppress(_Stop):
                teacher(input_ids=windows[i : i + batch], use_cache=False)
            store[i : i + batch] = caught.pop()
    finally:
        handle.remove()
    log.debug("teacher's hidden states: %d windows, %s, on %s", len(windows), store.dtype, store.device)
    return TeacherCache(head, store, device)


def _place(shape: tuple[int, ...], sample: Tensor, device: torch.device) -> torch.device:
    """The device if the cache is small beside its free memory, else the host."""
    if device.type != "cuda":
        return torch.device("cpu")
    size = torch.Size(shape).numel() * sample.element_size()
    return device if size * DEVICE_SHARE <= torch.cuda.mem_get_info(device)[0] else torch.device("cpu")
