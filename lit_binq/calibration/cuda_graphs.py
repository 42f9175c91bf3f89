"""A training loss captured as CUDA graphs: one launch forward and one backward instead of hundreds.

Blocks of small models are bound by kernel launches: about 12 ms a step for 2 ms of arithmetic on an H100. The first
call records the work of forward and backward; later calls with inputs of the same shape replay it. Inputs of other
shapes (the last, smaller batch of an epoch) and devices other than CUDA take the ordinary way.
"""

import gc
import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class GraphedLoss:
    """A scalar loss of a module with trainable parameters.

    Args:
        module: forward takes tensors without gradient and returns a scalar. What its parameters are and which of them
            require a gradient must not change afterwards; their values may.
        enabled: False always takes the ordinary way.
    """

    def __init__(self, module: nn.Module, enabled: bool = True) -> None:
        self.module, self.enabled = module, enabled
        self._shapes: list[torch.Size] | None = None
        self._graphed: nn.Module | None = None
        self._parameters: list[nn.Parameter] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss; under the autocast state of the first call."""
        if not self.enabled or not torch.is_grad_enabled() or inputs[0].device.type != "cuda":
            return self.module(*inputs)
        shapes = [t.shape for t in inputs]
        if self._shapes is None:
            self._shapes = shapes
            self._capture(inputs)
        if self._graphed is None or shapes != self._shapes:
            return self.module(*inputs)
        # A replay writes its gradients to the same memory as the last one, and even its forward pass may write there,
        # while autograd takes gradients over as `p.grad` without a copy where there was none. Those that are still
        # there, because several batches are summed, move out of the way.
        for p in self._parameters:
            if p.grad is not None:
                p.grad = p.grad.clone()
        loss: Tensor = self._graphed(*inputs)
        return loss.clone()  # the next replay writes over it

    def release(self) -> None:
        """Give back what a capture holds: the graphs' memory, inputs, gradients and with them the parameters.

        torch ties them into a cycle, so until the garbage collector comes by, every stage's would stay.
        """
        captured, self._graphed, self._parameters = self._graphed is not None, None, []
        self.enabled = False
        if captured:
            gc.collect()

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        # Not the cache of autocast: it would hand tensors of one capture to the next.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        step = _Step(self.module)
        try:
            with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
                # A loss need not reach every parameter: a head's bias, say.
                made = torch.cuda.make_graphed_callables(
                    step, tuple(t.clone() for t in inputs), allow_unused_input=True
                )
        except RuntimeError as error:  # a module that synchronises or allocates in ways a graph cannot hold
            log.warning("no CUDA graph (%s): steps are launched one by one", _reason(error))
            torch.cuda.synchronize()
            return
        assert isinstance(made, nn.Module)
        self._graphed = made
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]


def _reason(error: BaseException) -> str:
    """What went wrong first: leaving a capture that has failed raises an error of its own, which hides it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{lines[0]}; lower `data.batch_size`"
    return lines[0]


class _Step(nn.Module):
    """The module under another name: make_graphed_callables replaces the forward of what it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)
