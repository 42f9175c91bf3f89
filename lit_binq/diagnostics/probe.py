"""The single-layer probe: one linear layer of a block quantized, the rest of the block in full precision.

Legend: W (N, K) full-precision weight, W^ (N, K) a quantized one; x, x~ (n, T, d) the block's inputs in either
stream; y the full-precision block's output on x.

It answers what a layer's own error says about the block: a method may lower |W x~ - W^ x~| of a layer and yet raise
the loss of the block's output against y (arXiv 2512.21651). The block runs on x~ and is compared with y, so that a
loss stands there even if nothing is quantized: the probe's `floor`. Deviation: the input of a probed layer is that
of the full-precision block run on x~, because nothing before it is quantized.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_binq.diagnostics.measure import LinearSums, LossSums, device_of, exact, linear_inputs
from lit_binq.models.blocks import BlockCall, run_block
from lit_binq.utils.json_records import Probe, ProbeMeasures

Method = Callable[[str, nn.Linear], Tensor]
"""(name of the linear layer, the layer in full precision) -> the quantized weight as a dense (N, K)."""


class _Swapped(nn.Module):
    """A block that computes with another weight in one of its layers; the block itself is not touched."""

    def __init__(self, block: nn.Module, name: str, weight: Tensor) -> None:
        super().__init__()
        self._block, self._weights = [block], {f"{name}.weight": weight}  # a list: not a submodule

    def forward(self, *args: object, **kwargs: object) -> object:
        return functional_call(self._block[0], self._weights, args, kwargs)


def probe(
    reference: nn.Module,
    x: Tensor,
    x_tilde: Tensor,
    call: BlockCall,
    names: list[str],
    methods: Mapping[str, Method],
) -> Probe:
    """Quantize each linear layer alone, by each method, and measure the layer's and the block's error.

    Takes memory for the block's outputs on all windows, on the device of x; the block is left as it was.

    Args:
        reference: the full-precision block, on the device, in evaluation mode.
        x: (n, T, d) windows of the full-precision stream, on any device.
        x_tilde: (n, T, d) the same windows of the quantized stream.
        call: the block's other arguments.
        names: linear layers to probe, by name inside the block.
        methods: by name; called once for each layer.

    Returns:
        The record, to be put into the block's `BlockMeasures.probe`. A layer that does not see every token of a
        window once (experts) has errors of null and still a loss.

    Raises:
        ValueError: no windows, shapes that differ, no method, or a method that returns another shape.
    """
    if x.shape != x_tilde.shape or x.dim() != 3 or not len(x):
        raise ValueError(f"probe: got x {tuple(x.shape)} and x~ {tuple(x_tilde.shape)}, expected (n, T, d) alike")
    if not methods:
        raise ValueError("probe: got no methods, expected at least one")
    device, floor, y = device_of(reference), LossSums(), torch.empty_like(x)
    with exact(device):
        for w in range(len(x)):
            out = run_block(reference, x[w : w + 1].to(device), call)
            y[w : w + 1] = out.to(y.device)
            floor.add(run_block(reference, x_tilde[w : w + 1].to(device), call), out)
        linears = {name: _probe_layer(reference, name, (x, x_tilde, y), call, methods) for name in names}
    return Probe(floor.losses(), linears)


def _probe_layer(
    reference: nn.Module,
    name: str,
    streams: tuple[Tensor, Tensor, Tensor],
    call: BlockCall,
    methods: Mapping[str, Method],
) -> dict[str, ProbeMeasures]:
    linear = reference.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    device, (x, x_tilde, y) = device_of(reference), streams
    weights = {method: solve(name, linear).detach().to(linear.weight) for method, solve in methods.items()}
    for method, weight in weights.items():
        if weight.shape != linear.weight.shape:
            raise ValueError(
                f"probe: method {method!r} gave {tuple(weight.shape)} for {name}, expected {tuple(linear.weight.shape)}"
            )
    errors = {method: LinearSums(linear.weight.detach().float()) for method in methods}
    losses = {method: LossSums() for method in methods}
    comparable = True
    for w in range(len(x)):
        hidden, hidden_tilde = (s[w : w + 1].to(device).float() for s in (x, x_tilde))
        inputs = [linear_inputs(reference, [name], h, call)[0].get(name) for h in (hidden, hidden_tilde)]
        comparable = comparable and all(t is not None and len(t) == hidden.shape[1] for t in inputs)
        for method, weight in weights.items():
            losses[method].add(
                run_block(_Swapped(reference, name, weight), hidden_tilde, call), y[w : w + 1].to(device)
            )
            if comparable and inputs[0] is not None and inputs[1] is not None:
                errors[method].add(inputs[0], inputs[1], weight.float(), token_grams=False)
    measured = {}
    for method, weight in weights.items():
        layer = errors[method].measures(weight.float()) if comparable else None
        measured[method] = ProbeMeasures(
            layer.activation_error_relative if layer else None,
            layer.output_error_relative if layer else None,
            losses[method].losses(),
        )
    return measured
