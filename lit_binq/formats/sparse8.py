"""The sparse 8-bit format: chosen weights at 8 bits with their positions, all others one bit with a row scale.

Legend: N rows, K columns; M (N, K) 0/1 mask of the chosen weights, Q (count,) their 8-bit values in row-major order,
B (N, K) signs, r (N,) scales of the signs, s (N,) scales of the values;
    W^_ij = s_i Q_ij where M_ij, else r_i B_ij

True bits: 1 for the signs (kept at chosen places, too, so that a sign is found without counting), 1 for the mask,
8 count / (N K) for the values, 32 / K for the scales. With 10% chosen that is 2.8; the 1.7 bits that are quoted for
it (0.9 x 1 + 0.1 x 8) leave out the positions and the scales.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_binq.formats.base import Buffer, LatentLinear, PackedLinear, Solution, code_buffer, half_buffer, half_scales
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.packing import pack_signs, unpack_signs


@dataclass
class Sparse8(Solution):
    """An unpacked sparse 8-bit weight.

    Attributes:
        r: (N,) scales of the signs, float.
        B: (N, K) signs, -1 or +1, float; where a weight is chosen they say nothing.
        s: (N,) scales of the 8-bit values, float.
        Q: (N, K) whole numbers from -127 to 127, float; zero where a weight is not chosen.
        mask: (N, K) bool, the chosen weights.
    """

    r: Tensor
    B: Tensor
    s: Tensor
    Q: Tensor
    mask: Tensor

    def dense(self) -> Tensor:
        """(N, K)."""
        return torch.where(self.mask, self.s[:, None] * self.Q, self.r[:, None] * self.B)

    def pack(self, bias: Tensor | None = None) -> "Sparse8Linear":
        """The layer that stores it; bias (N,) or None."""
        return Sparse8Linear.from_solution(self, bias)


def scatter_values(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K): values (count,) at the places of mask (N, K) bool in row-major order, zero elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter_(mask, values.to(dtype))


@torch.library.custom_op("lit_binq::sparse8_matmul", mutates_args=())
def sparse8_matmul(
    x: Tensor,
    codes: Tensor,
    mask: Tensor,
    values: Tensor,
    row_scale: Tensor,
    value_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    """y_i = sum_j x_j (s_i Q_ij where M_ij, else r_i B_ij) + bias_i, in x's dtype.

    Args:
        x: (..., K) float.
        codes: (N, ceil(K / 8)) uint8, the signs B, see `lit_binq.formats.packing`.
        mask: (N, ceil(K / 8)) uint8, the bits M.
        values: (count,) int8, Q at the set bits of M in row-major order.
        row_scale: (N,) float16, r.
        value_scale: (N,) float16, s.
        bias: (N,) float or None.
        in_features: K.

    Returns:
        (..., N), dtype of x.
    """
    chosen = unpack_signs(mask, in_features) > 0
    B = unpack_signs(codes, in_features, x.dtype)
    Q = scatter_values(values, chosen, x.dtype)
    W = torch.where(chosen, value_scale.to(x.dtype)[:, None] * Q, row_scale.to(x.dtype)[:, None] * B)
    return nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


@sparse8_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    mask: Tensor,
    values: Tensor,
    row_scale: Tensor,
    value_scale: Tensor,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


class Sparse8Linear(PackedLinear):
    """A linear layer stored as sign bits, a mask, 8-bit values and two float16 scales a row.

    Buffers:
        codes, mask: (N, ceil(K / 8)) uint8; signs are clear where the mask is set.
        values: (count,) int8.
        row_scale, value_scale: (N,) float16.
        bias: (N,) float, or None.

    Args:
        in_features: K.
        out_features: N.
        count: number of chosen weights, from 0 to N K.
        bias: whether a bias is stored.
        dtype: dtype of the bias.
    """

    kind: ClassVar[str] = "sparse8"
    codes: Tensor
    mask: Tensor
    values: Tensor
    row_scale: Tensor
    value_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, count: int, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not 0 <= count <= in_features * out_features:
            raise ValueError(f"count {count}")
        self.count = count
        stored = {
            "codes": code_buffer(out_features, in_features),
            "mask": code_buffer(out_features, in_features),
            "values": Buffer((count,), torch.int8),
            "row_scale": half_buffer(out_features),
            "value_scale": half_buffer(out_features),
        }
        self._allocate(in_features, out_features, stored, bias, dtype)

    def layout(self) -> dict[str, int]:
        """{"count": number of chosen weights}."""
        return {"count": self.count}

    @classmethod
    def from_solution(cls, solution: Sparse8, bias: Tensor | None = None) -> "Sparse8Linear":
        """Pack a solver's result; bias (N,) or None. Raises LitBinqError where a scale does not fit float16."""
        s = solution
        N, K = s.B.shape
        values = s.Q[s.mask].to(torch.int8)
        tensors = {
            "codes": pack_signs(s.B.masked_fill(s.mask, -1.0)),
            "mask": pack_signs(s.mask.float() - 0.5),
            "values": values,
            "row_scale": half_scales(s.r, "row_scale"),
            "value_scale": half_scales(s.s, "value_scale"),
        }
        return cls._holding(K, N, bias, tensors, count=len(values))

    def refresh(self) -> None:
        """Check the mask against the number of values.

        Raises:
            ValueError: the mask does not have `count` bits.
        """
        chosen = int((unpack_signs(self.mask, self.in_features) > 0).sum())
        if chosen != self.count:
            raise ValueError(f"mask marks {chosen} weights, expected {self.count}")

    def solution(self) -> Sparse8:
        """The stored weight, unpacked to float32."""
        mask = unpack_signs(self.mask, self.in_features) > 0
        Q = scatter_values(self.values, mask, torch.float32)
        B = unpack_signs(self.codes, self.in_features)
        return Sparse8(self.row_scale.float(), B, self.value_scale.float(), Q, mask)

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentSparse8Linear":
        """The trainable twin; see the base class."""
        return LatentSparse8Linear(self.solution(), self.bias, train_codes, target)

    def operands(self) -> list[tuple[str, list[Tensor]]]:
        """One product."""
        stored = [self.codes, self.mask, self.values, self.row_scale, self.value_scale]
        return [("Sparse8MatMul", self._with_bias(stored))]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return sparse8_matmul(
            x, self.codes, self.mask, self.values, self.row_scale, self.value_scale, self.bias, self.in_features
        )


class LatentSparse8Linear(LatentLinear):
    """The trainable twin: signs and both scales learn; which weights are chosen and their 8-bit values stay.

    Args:
        solution: the start.
        bias: (N,) or None; kept as it is.
        train_codes: whether signs may change.
        target: (N, K), sets the size of the latents.
    """

    Q: Tensor
    mask: Tensor

    def __init__(self, solution: Sparse8, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = solution.B.shape
        # Chosen weights are large and their signs idle: they must not set the mean size of the others' latents.
        sizes = None if target is None else target.masked_fill(solution.mask, 0.0)
        self.v = latent_codes(solution.B, train_codes, sizes)
        self.train_codes = train_codes
        self.r = nn.Parameter(solution.r.detach().float().clone())
        self.s = nn.Parameter(solution.s.detach().float().clone())
        self.register_buffer("Q", solution.Q.clone())
        self.register_buffer("mask", solution.mask.clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents, or nothing."""
        return [self.v] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """Scales of the signs and of the values."""
        return [self.r, self.s]

    def solution(self) -> Sparse8:
        """The current weight."""
        return Sparse8(self.r.detach(), signs(self.v.detach()), self.s.detach(), self.Q, self.mask)

    def pack(self) -> Sparse8Linear:
        """The current weight, packed."""
        return Sparse8Linear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        weight = torch.where(self.mask, self.s[:, None] * self.Q, self.r[:, None] * straight_through(self.v))
        return nn.functional.linear(x, weight, self.bias)
