"""What is stored: codes and scales, true bits, dequantization. One format a file; knows nothing above itself."""

from lit_binq.formats.base import FORMATS, LatentLinear, PackedLinear, Solution, register
from lit_binq.formats.dense_only import CountedSolution, DenseOnlyLinear
from lit_binq.formats.grouped import Grouped, GroupedLinear, LatentGroupedLinear, grouped_binary_matmul
from lit_binq.formats.low_rank import LatentLowRankLinear, LowRank, LowRankLinear
from lit_binq.formats.operators import OPERATORS, Operator, Product, operator
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.planes import LatentPlanesLinear, Planes, PlanesLinear, planes_matmul
from lit_binq.formats.row_column import BinaryLinear, LatentBinaryLinear, RowColumn, binary_matmul
from lit_binq.formats.two_plane.latent import LatentTwoPlaneLinear
from lit_binq.formats.two_plane.linear import TwoPlaneLinear, two_plane_matmul
from lit_binq.formats.two_plane.solution import InputFormat, TwoPlane

__all__ = [
    "FORMATS",
    "OPERATORS",
    "BinaryLinear",
    "CountedSolution",
    "DenseOnlyLinear",
    "Grouped",
    "GroupedLinear",
    "InputFormat",
    "LatentBinaryLinear",
    "LatentGroupedLinear",
    "LatentLinear",
    "LatentLowRankLinear",
    "LatentPlanesLinear",
    "LatentTwoPlaneLinear",
    "LowRank",
    "LowRankLinear",
    "Operator",
    "PackedLinear",
    "Planes",
    "PlanesLinear",
    "Product",
    "RowColumn",
    "Solution",
    "TwoPlane",
    "TwoPlaneLinear",
    "binary_matmul",
    "grouped_binary_matmul",
    "operator",
    "pack_signs",
    "packed_width",
    "planes_matmul",
    "register",
    "two_plane_matmul",
    "unpack_signs",
]
