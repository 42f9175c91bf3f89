"""The row mean format: W^_ij = m_i + a_i B_ij, one bit a weight, a mean and a scale a row.

Legend: N output rows, K input columns; m (N,) row means, a (N,) row scales, B (N, K) signs in {-1, +1}.
True bits: 1 + 32 / K, plus the padding of a row to whole bytes.

The layer is a row x column product whose column scales are one, plus the rank-one term m (sum_j x_j). The ones are
not stored, they follow from the format.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_binq.formats.base import LatentLinear, PackedLinear, Solution, code_buffer, half_buffer, half_scales
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.packing import pack_signs, unpack_signs
from lit_binq.formats.row_column import binary_matmul


@dataclass
class RowMean(Solution):
    """An unpacked row mean weight.

    Attributes:
        m: (N,) row means, float.
        a: (N,) row scales, float.
        B: (N, K) signs, -1 or +1, float.
    """

    m: Tensor
    a: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """(N, K)."""
        return self.m[:, None] + self.a[:, None] * self.B

    def pack(self, bias: Tensor | None = None) -> "RowMeanLinear":
        """The layer that stores it; bias (N,) or None."""
        return RowMeanLinear.from_solution(self, bias)


class RowMeanLinear(PackedLinear):
    """A linear layer stored as sign bits, float16 row scales and float16 row means.

    Buffers:
        codes: (N, ceil(K / 8)) uint8.
        row_scale, row_mean: (N,) float16.
        bias: (N,) float, or None.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias is stored.
        dtype: dtype of the bias.
    """

    kind: ClassVar[str] = "row_mean"
    codes: Tensor
    row_scale: Tensor
    row_mean: Tensor
    ones: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        stored = {
            "codes": code_buffer(out_features, in_features),
            "row_scale": half_buffer(out_features),
            "row_mean": half_buffer(out_features),
        }
        # What the product's column scales are in this format: known without a file, so not stored.
        ones = torch.ones(in_features, dtype=torch.float16)
        self._allocate(in_features, out_features, stored, bias, dtype, {"ones": ones})

    @classmethod
    def from_solution(cls, solution: RowMean, bias: Tensor | None = None) -> "RowMeanLinear":
        """Pack a solver's result; bias (N,) or None.

        Raises:
            LitBinqError: a scale or a mean does not fit float16.
        """
        s = solution
        tensors = {
            "codes": pack_signs(s.B),
            "row_scale": half_scales(s.a, "row_scale"),
            "row_mean": half_scales(s.m, "row_mean"),
        }
        return cls._holding(s.B.shape[1], s.B.shape[0], bias, tensors)

    def solution(self) -> RowMean:
        """The stored weight, unpacked to float32."""
        return RowMean(self.row_mean.float(), self.row_scale.float(), unpack_signs(self.codes, self.in_features))

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentRowMeanLinear":
        """The trainable twin; see the base class."""
        return LatentRowMeanLinear(self.solution(), self.bias, train_codes, target)

    def operands(self) -> list[tuple[str, list[Tensor]]]:
        """One product, whose column scales are one. The means' term is made of standard operators."""
        read = [self.codes, self.row_scale, self.ones]
        return [("BinaryMatMul", self._with_bias(read))]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = binary_matmul(x, self.codes, self.row_scale, self.ones, self.bias, self.in_features)
        return y + x.sum(-1, keepdim=True) * self.row_mean.to(x.dtype)


class LatentRowMeanLinear(LatentLinear):
    """The trainable twin: W^ = m + a sign(v).

    Args:
        solution: m (N,), a (N,), B (N, K).
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K), sets the size of the latents: the distance of the target to its row's mean.
    """

    def __init__(self, solution: RowMean, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = solution.B.shape
        distance = None if target is None else target - solution.m[:, None]
        self.v = latent_codes(solution.B, train_codes, distance)
        self.train_codes = train_codes
        self.m = nn.Parameter(solution.m.detach().float().clone())
        self.a = nn.Parameter(solution.a.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """m and a."""
        return [self.m, self.a]

    def solution(self) -> RowMean:
        """The current weight."""
        return RowMean(self.m.detach(), self.a.detach(), signs(self.v.detach()))

    def pack(self) -> RowMeanLinear:
        """The current weight, packed."""
        return RowMeanLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = nn.functional.linear(x, straight_through(self.v)) * self.a + x.sum(-1, keepdim=True) * self.m
        return y if self.bias is None else y + self.bias
