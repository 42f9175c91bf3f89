"""What is stored: codes and scales, true bits, dequantization. One format a file; knows nothing above itself."""

from lit_binq.formats.base import LatentLinear, PackedLinear, Solution
from lit_binq.formats.grouped import Grouped, GroupedLinear, LatentGroupedLinear, grouped_binary_matmul
from lit_binq.formats.levels import LatentLevelsLinear, Levels, LevelsLinear, levels_matmul
from lit_binq.formats.low_rank import LatentLowRankLinear, LowRank, LowRankLinear
from lit_binq.formats.mean import LatentRowMeanLinear, RowMean, RowMeanLinear
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.planes import LatentPlanesLinear, Planes, PlanesLinear, planes_matmul
from lit_binq.formats.row_column import BinaryLinear, LatentBinaryLinear, RowColumn, binary_matmul
from lit_binq.formats.sparse8 import LatentSparse8Linear, Sparse8, Sparse8Linear, sparse8_matmul
from lit_binq.formats.two_plane.latent import LatentTwoPlaneLinear
from lit_binq.formats.two_plane.linear import TwoPlaneLinear, two_plane_matmul
from lit_binq.formats.two_plane.solution import InputFormat, TwoPlane

FORMATS: dict[str, type[PackedLinear]] = {
    layer.kind: layer
    for layer in (
        BinaryLinear,
        PlanesLinear,
        GroupedLinear,
        LowRankLinear,
        LevelsLinear,
        RowMeanLinear,
        Sparse8Linear,
        TwoPlaneLinear,
    )
}
"""Every format that a packed folder may hold, by the name it has there."""

__all__ = [
    "FORMATS",
    "BinaryLinear",
    "Grouped",
    "GroupedLinear",
    "InputFormat",
    "LatentBinaryLinear",
    "LatentGroupedLinear",
    "LatentLevelsLinear",
    "LatentLinear",
    "LatentLowRankLinear",
    "LatentPlanesLinear",
    "LatentRowMeanLinear",
    "LatentSparse8Linear",
    "LatentTwoPlaneLinear",
    "Levels",
    "LevelsLinear",
    "LowRank",
    "LowRankLinear",
    "PackedLinear",
    "Planes",
    "PlanesLinear",
    "RowColumn",
    "RowMean",
    "RowMeanLinear",
    "Solution",
    "Sparse8",
    "Sparse8Linear",
    "TwoPlane",
    "TwoPlaneLinear",
    "binary_matmul",
    "grouped_binary_matmul",
    "levels_matmul",
    "pack_signs",
    "packed_width",
    "planes_matmul",
    "sparse8_matmul",
    "two_plane_matmul",
    "unpack_signs",
]
