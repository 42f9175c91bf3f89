"""Operators: what a packed linear multiplies by, each described once, by the torch function that defines it.

From the description follow the torch operator with its shape, the node that tracing and the writer make of a call, and
the order in which a node holds its tensors. What is left to say elsewhere is the meaning in standard ONNX operators
(`lit_binq_onnx.functions`) and, to be fast, the C++ operator of the same name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """y = x W^T + bias for some packed W. Reads x, then `tensors`, then an optional float32 bias.

    Attributes:
        name: in ONNX, of the domain lit_binq.
        torch_name: in torch's namespace lit_binq.
        tensors: {name: dtype} of the weight's tensors, in order; the first, `codes`, has a row for each output.
        attributes: {name of the torch argument: name of the node's attribute}, whole numbers, in torch's order.
        call: the torch operator.
    """

    name: str
    torch_name: str
    tensors: dict[str, torch.dtype]
    attributes: dict[str, str]
    call: Callable[..., Tensor]


OPERATORS: dict[str, Operator] = {}
"""Every operator that a packed linear may call, by its name in ONNX."""


def operator(name: str, **tensors: torch.dtype) -> Callable[[Callable[..., Tensor]], Any]:
    """Make a function f(x, *tensors, bias, in_features, ...) an operator.

    Args:
        name: in ONNX.
        tensors: the dtype of each tensor, in the function's order; the first has a row for each output.

    Returns:
        A decorator; it returns the torch operator, lit_binq::<name of the function>.

    Raises:
        ValueError: the function's parameters are others.
    """

    def register(function: Callable[..., Tensor]) -> Any:
        parameters = list(inspect.signature(function).parameters)
        wanted = ["x", *tensors, "bias", "in_features"]
        if parameters[: len(wanted)] != wanted:
            raise ValueError(f"operator {name}: {function.__name__} takes {parameters}, expected {wanted} first")
        call = torch.library.custom_op(f"lit_binq::{function.__name__}", mutates_args=())(function)

        @call.register_fake
        def _(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
            return x.new_empty((*x.shape[:-1], codes.shape[0]))

        numbers = parameters[len(wanted) - 1 :]
        attributes = {argument: "K" if argument == "in_features" else argument for argument in numbers}
        OPERATORS[name] = Operator(name, function.__name__, tensors, attributes, call)
        return call

    return register


@dataclass(frozen=True)
class Product:
    """One operator call of a layer's forward pass.

    Attributes:
        operator: its name in ONNX.
        tensors: what it reads beside x, in the operator's order.
        numbers: its whole numbers by the torch argument's name, in the operator's order.
        bias: (N,) or None.
        columns: (k,) int64, the columns of the input that it reads; None reads all.
        chained: it multiplies what the products before it gave; otherwise the layer's input, adding to what they gave.
    """

    operator: str
    tensors: list[Tensor]
    numbers: dict[str, int]
    bias: Tensor | None = None
    columns: Tensor | None = None
    chained: bool = False

    def operands(self) -> list[Tensor]:
        """The stored tensors of a node, in order, a bias as float32 behind them."""
        return self.tensors if self.bias is None else [*self.tensors, self.bias.float()]

    def attributes(self) -> dict[str, int]:
        """The node's attributes."""
        names = OPERATORS[self.operator].attributes
        return {names[argument]: number for argument, number in self.numbers.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """(..., k) -> (..., N)."""
        return OPERATORS[self.operator].call(x, *self.tensors, self.bias, *self.numbers.values())


def multiply(products: list[Product], x: Tensor) -> Tensor:
    """What products give together, (..., K) -> (..., N)."""
    y: Tensor | None = None
    for product in products:
        read = y if product.chained and y is not None else x
        term = product(read if product.columns is None else read.index_select(-1, product.columns))
        y = term if y is None or product.chained else y + term
    assert y is not None
    return y
