"""Packed linears of a model: which there are, how a file describes one, and an empty one from its description."""

from typing import Any

from torch import nn

from lit_binq.errors import LitBinqError, first_line
from lit_binq.formats import FORMATS, PackedLinear
from lit_binq.formats.base import parse_layout


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear of the model, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def describe_layer(layer: PackedLinear) -> dict[str, Any]:
    """The entry of a packed linear in lit_binq.json: its format and what fixes the shapes of its tensors."""
    return {"format": layer.kind, **layer.layout()}


def empty_layer(linear: nn.Linear, entry: Any) -> PackedLinear:
    """A packed linear of the shape of `linear` with zeroed buffers, as `entry` (see `describe_layer`) says.

    Raises:
        LitBinqError: an unknown format, or a layout that does not belong to it.
    """
    kind, layout = parse_layout(entry)
    if kind not in FORMATS:
        raise LitBinqError(f"format {kind!r:.60}, expected one of {sorted(FORMATS)}")
    bias = linear.bias is not None
    try:
        return FORMATS[kind](linear.in_features, linear.out_features, bias, linear.weight.dtype, **layout)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise LitBinqError(
            f"layout {layout!s:.200} does not belong to format {kind!r} ({first_line(error)})"
        ) from error
