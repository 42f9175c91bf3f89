"""From torch operators to nodes of domain lit_binq: one table, from which schemas and translations follow.

A new format with an operator of its own is one entry in `OPERATORS`, one body in `lit_binq_onnx.functions` and one
class in csrc. Formats made of operators that are here need nothing. The planes format is one operator to torch, so that
tracing passes a layer once and not once a plane; its translation writes one BinaryMatMul for each plane.

Knows torch's exporter and the operators' names and types; nothing of models or files.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnxscript
import torch
from onnx.defs import OpSchema

import lit_binq.formats  # noqa: F401  # registers the torch operators that the table names
from lit_binq_onnx.functions import DOMAIN, OPSET, VERSION

_TYPES = {
    "float32": ("tensor(float)", onnxscript.FLOAT),
    "float16": ("tensor(float16)", onnxscript.FLOAT16),
    "uint8": ("tensor(uint8)", onnxscript.UINT8),
}


@dataclass(frozen=True)
class Operator:
    """An operator of the domain. In torch and in ONNX it reads x, then `tensors`, then an optional float32 bias.

    Attributes:
        name: in ONNX.
        torch_name: in torch's namespace lit_binq.
        tensors: (name, type) of the weight's tensors, in order.
        attributes: {name of the torch argument: name of the node's attribute}, whole numbers, in torch's order.
    """

    name: str
    torch_name: str
    tensors: tuple[tuple[str, str], ...]
    attributes: dict[str, str]

    def schema(self) -> OpSchema:
        """What onnxscript must know to build the node: names, types, and that the bias may be absent."""
        parameter = OpSchema.FormalParameter
        optional = OpSchema.FormalParameterOption.Optional
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            inputs=[
                parameter("X", "tensor(float)"),
                *(parameter(name, _TYPES[kind][0]) for name, kind in self.tensors),
                parameter("bias", "tensor(float)", param_option=optional),
            ],
            outputs=[parameter("Y", "tensor(float)")],
            attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in self.attributes.values()],
        )

    def node(self) -> Callable[..., Any]:
        """What writes one node: called with its inputs in order, a bias last if there is one, and its attributes."""
        opset = onnxscript.values.Opset(DOMAIN, VERSION)
        operator: Callable[..., Any] = onnxscript.values.Op(opset, self.name, self.schema())
        return operator

    def translation(self) -> Callable[..., Any]:
        """A call of the torch operator as one node, for torch.onnx: arguments as the torch operator's."""
        operator = self.node()
        tensors = 1 + len(self.tensors)

        def translate(*arguments: Any) -> Any:
            inputs, bias, numbers = arguments[:tensors], arguments[tensors], arguments[tensors + 1 :]
            given = inputs if bias is None else (*inputs, bias)
            return operator(*given, **dict(zip(self.attributes.values(), numbers, strict=True)))

        return _annotated(
            translate,
            self.torch_name,
            {
                "x": onnxscript.FLOAT,
                **{name: _TYPES[kind][1] for name, kind in self.tensors},
                "bias": onnxscript.FLOAT | None,
                **dict.fromkeys(self.attributes, int),
            },
        )


def _annotated(translate: Callable[..., Any], name: str, annotations: dict[str, Any]) -> Callable[..., Any]:
    """The same function with a signature: the exporter tells tensors from numbers by it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=a) for name, a in annotations.items()]
    translate.__name__ = name
    translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # not declared, but read
    translate.__annotations__ = {**annotations, "return": onnxscript.FLOAT}
    return translate


OPERATORS = (
    Operator(
        "BinaryMatMul",
        "binary_matmul",
        (("codes", "uint8"), ("row_scale", "float16"), ("col_scale", "float16")),
        {"in_features": "K"},
    ),
    Operator(
        "GroupedBinaryMatMul",
        "grouped_binary_matmul",
        (("codes", "uint8"), ("scales", "float16")),
        {"in_features": "K", "group": "group"},
    ),
    Operator(
        "TwoPlaneMatMul",
        "two_plane_matmul",
        (
            ("codes", "uint8"),
            ("selector", "uint8"),
            ("levels", "float16"),
            ("outlier_bits", "uint8"),
            ("input_scales", "float16"),
            ("input_range", "float32"),
        ),
        {"in_features": "K", "group": "group", "activation_bits": "activation_bits", "outliers": "outliers"},
    ),
)
"""Every operator that a packed linear may call."""


def _planes_translation() -> Callable[..., Any]:
    """A call of `planes_matmul` as the sum of one product a plane, each with its columns of x."""
    product = next(o for o in OPERATORS if o.name == "BinaryMatMul").node()
    standard: Any = getattr(onnxscript, f"opset{OPSET}")

    def translate(
        x: Any,
        codes: Sequence[Any],
        row_scales: Sequence[Any],
        col_scales: Sequence[Any],
        columns: Sequence[Any],
        bias: Any,
        counts: Sequence[int],
    ) -> Any:
        first = (x, codes[0], row_scales[0], col_scales[0])
        y = product(*first, K=counts[0]) if bias is None else product(*first, bias, K=counts[0])
        further = zip(codes[1:], row_scales[1:], col_scales[1:], columns, counts[1:], strict=True)
        for stored, r, c, chosen, k in further:
            part = x if k == counts[0] else standard.Gather(x, chosen, axis=-1)
            y = standard.Add(y, product(part, stored, r, c, K=k))
        return y

    annotations = {
        "x": onnxscript.FLOAT,
        "codes": Sequence[onnxscript.UINT8],
        "row_scales": Sequence[onnxscript.FLOAT16],
        "col_scales": Sequence[onnxscript.FLOAT16],
        "columns": Sequence[onnxscript.INT64],
        "bias": onnxscript.FLOAT | None,
        "counts": Sequence[int],
    }
    return _annotated(translate, "planes_matmul", annotations)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """{torch operator: its translation}, as torch.onnx.export takes it."""
    table = {getattr(torch.ops.lit_binq, o.torch_name).default: o.translation() for o in OPERATORS}
    return {**table, torch.ops.lit_binq.planes_matmul.default: _planes_translation()}
