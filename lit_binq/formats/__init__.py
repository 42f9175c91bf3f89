"""What is stored: codes and scales, true bits, dequantization. One format a file; knows nothing above itself."""

from lit_binq.formats.base import LatentLinear, PackedLinear, Solution
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.row_column import BinaryLinear, LatentBinaryLinear, RowColumn, binary_matmul
from lit_binq.formats.salient import LatentSalientLinear, Salient, SalientLinear

FORMATS: dict[str, type[PackedLinear]] = {layer.kind: layer for layer in (BinaryLinear, SalientLinear)}
"""Every format that a packed folder may hold, by the name it has there."""

__all__ = [
    "FORMATS",
    "BinaryLinear",
    "LatentBinaryLinear",
    "LatentLinear",
    "LatentSalientLinear",
    "PackedLinear",
    "RowColumn",
    "Salient",
    "SalientLinear",
    "Solution",
    "binary_matmul",
    "pack_signs",
    "packed_width",
    "unpack_signs",
]
