"""What is stored: codes and scales, true bits, dequantization. One format a file; knows nothing above itself."""

from lit_binq.formats.base import PackedLinear
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.row_column import BinaryLinear, RowColumn, binary_matmul

__all__ = [
    "BinaryLinear",
    "PackedLinear",
    "RowColumn",
    "binary_matmul",
    "pack_signs",
    "packed_width",
    "unpack_signs",
]
