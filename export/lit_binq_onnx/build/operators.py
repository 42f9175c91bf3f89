"""From torch operators to nodes of domain lit_binq: schemas and translations, made from the operators' descriptions.

What an operator reads stands in `lit_binq.formats.operators`, what it means in `lit_binq_onnx.functions`. The planes
format is one operator to torch, so that tracing passes a layer once and not once a plane; its translation writes one
BinaryMatMul for each plane.

Knows torch's exporter and the operators' names and types; nothing of models or files.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from onnx.defs import OpSchema

from lit_binq.formats import OPERATORS, Operator
from lit_binq_onnx.functions import DOMAIN, OPSET, VERSION

_TYPES = {
    torch.float32: ("tensor(float)", onnxscript.FLOAT),
    torch.float16: ("tensor(float16)", onnxscript.FLOAT16),
    torch.uint8: ("tensor(uint8)", onnxscript.UINT8),
    torch.int8: ("tensor(int8)", onnxscript.INT8),
}


def schema(operator: Operator) -> OpSchema:
    """What onnxscript must know to build a node: names, types, and that the bias may be absent."""
    parameter = OpSchema.FormalParameter
    optional = OpSchema.FormalParameterOption.Optional
    return OpSchema(
        operator.name,
        DOMAIN,
        VERSION,
        inputs=[
            parameter("X", "tensor(float)"),
            *(parameter(name, _TYPES[dtype][0]) for name, dtype in operator.tensors.items()),
            parameter("bias", "tensor(float)", param_option=optional),
        ],
        outputs=[parameter("Y", "tensor(float)")],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in operator.attributes.values()],
    )


def node_of(operator: Operator) -> Callable[..., Any]:
    """What writes one node: called with its inputs in order, a bias last if there is one, and its attributes."""
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    made: Callable[..., Any] = onnxscript.values.Op(opset, operator.name, schema(operator))
    return made


def translation(operator: Operator) -> Callable[..., Any]:
    """A call of the torch operator as one node, for torch.onnx: arguments as the torch operator's."""
    node = node_of(operator)
    tensors = 1 + len(operator.tensors)

    def translate(*arguments: Any) -> Any:
        inputs, bias, numbers = arguments[:tensors], arguments[tensors], arguments[tensors + 1 :]
        given = inputs if bias is None else (*inputs, bias)
        return node(*given, **dict(zip(operator.attributes.values(), numbers, strict=True)))

    return _annotated(
        translate,
        operator.torch_name,
        {
            "x": onnxscript.FLOAT,
            **{name: _TYPES[dtype][1] for name, dtype in operator.tensors.items()},
            "bias": onnxscript.FLOAT | None,
            **dict.fromkeys(operator.attributes, int),
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


def _planes_translation() -> Callable[..., Any]:
    """A call of `planes_matmul` as the sum of one product a plane, each with its columns of x."""
    product = node_of(OPERATORS["BinaryMatMul"])
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
    table = {getattr(torch.ops.lit_binq, o.torch_name).default: translation(o) for o in OPERATORS.values()}
    return {**table, torch.ops.lit_binq.planes_matmul.default: _planes_translation()}
