"""The levels format: two bits a weight, which pick one of four levels of the weight's row and group of columns.

Legend: N rows, K columns, g columns a group, z zones (1 or 2); A, B (N, K) bits; L (N, G, 4) levels, c (K,) column
scales or none;
    W^_ij = L[i, group(j), A_ij + 2 B_ij] c_j,    group(j) = z (j // g) + s_j,    G = z ceil(K / g)

With one zone s_j = 0. With two, s_j is column j's bit in a bitmap, so that salient columns have levels of their own
inside each group of g columns. What the levels mean is the solver's matter; its four sorts are

    two magnitude groups    A the sign, B the group:             m1 - a1, m1 + a1, m2 - a2, m2 + a2
    sign and residual sign  A the sign, B the residual's sign:   m - a1 - a2, m + a1 - a2, m - a1 + a2, m + a1 + a2
    two planes W(1+1)       A the sign, B the selector:          four free levels
    with column scales      any of them, times c_j

True bits: 2 + 64 G / K, that is 2.5 for g = 128 and one zone, 3.0 for two, and K bits for a bitmap, 16 K for column
scales, if there are any. A format that stored means and sizes instead of levels would need 3 numbers rather than 4
for a sign with a residual sign, and 2 where means are zero; levels cost more bits and say at once what is multiplied.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import Buffer, LatentLinear, PackedLinear, Solution, code_buffer, half_buffer, half_scales
from lit_binq.formats.latent import latent_codes, signs, straight_through
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs


@dataclass
class Levels(Solution):
    """An unpacked weight of four levels a row and group.

    Attributes:
        levels: (N, G, 4) float.
        codes: (N, K) uint8, 0 to 3: bit A + 2 * bit B.
        group: g, columns a group.
        salient: (K,) bool, the columns of the second zone; None for one zone.
        c: (K,) column scales, float; None for none.
    """

    levels: Tensor
    codes: Tensor
    group: int
    salient: Tensor | None = None
    c: Tensor | None = None

    @property
    def zones(self) -> int:
        """1 or 2."""
        return 1 if self.salient is None else 2

    def dense(self) -> Tensor:
        """(N, K)."""
        groups = column_groups(self.codes.shape[1], self.group, self.salient, self.levels.device)
        W = self.levels.flatten(1).gather(1, 4 * groups + self.codes.long())
        return W if self.c is None else W * self.c

    def pack(self, bias: Tensor | None = None) -> "LevelsLinear":
        """The layer that stores it; bias (N,) or None."""
        return LevelsLinear.from_solution(self, bias)

    def balanced(self) -> "Levels":
        """The same weight with column scales of geometric mean about 1, so that both fit float16."""
        if self.c is None or not bool((self.c != 0).any()):
            return self
        shift = torch.exp2(torch.round(self.c.abs()[self.c != 0].log2().mean()))
        return Levels(self.levels * shift, self.codes, self.group, self.salient, self.c / shift)


def group_count(in_features: int, group: int, zones: int) -> int:
    """G = zones * ceil(K / g)."""
    return zones * -(-in_features // group)


def column_groups(in_features: int, group: int, salient: Tensor | None, device: torch.device) -> Tensor:
    """(K,) int64: the group of levels that each column belongs to.

    Args:
        in_features: K.
        group: g.
        salient: (K,) bool or 0/1, or None for one zone.
        device: where the result goes.
    """
    block = torch.arange(in_features, device=device) // group
    return block if salient is None else 2 * block + salient.long()


@torch.library.custom_op("lit_binq::levels_matmul", mutates_args=())
def levels_matmul(
    x: Tensor,
    codes: Tensor,
    selector: Tensor,
    levels: Tensor,
    column_bits: Tensor,
    bias: Tensor | None,
    in_features: int,
    group: int,
    zones: int,
) -> Tensor:
    """y_i = sum_j x_j L[i, group(j), A_ij + 2 B_ij] + bias_i, in x's dtype.

    Args:
        x: (..., K) float.
        codes: (N, ceil(K / 8)) uint8, the bits A, see `lit_binq.formats.packing`.
        selector: (N, ceil(K / 8)) uint8, the bits B.
        levels: (N, zones * ceil(K / group), 4) float16.
        column_bits: (ceil(K / 8),) uint8, the columns of the second zone; (0,) with one zone.
        bias: (N,) float or None.
        in_features: K.
        group: g.
        zones: 1 or 2.

    Returns:
        (..., N), dtype of x.
    """
    salient = unpack_signs(column_bits[None], in_features)[0] > 0 if zones == 2 else None
    code = (unpack_signs(codes, in_features) > 0).long() + 2 * (unpack_signs(selector, in_features) > 0).long()
    groups = column_groups(in_features, group, salient, x.device)
    W = levels.to(x.dtype).flatten(1).gather(1, 4 * groups + code)
    return nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


@levels_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    selector: Tensor,
    levels: Tensor,
    column_bits: Tensor,
    bias: Tensor | None,
    in_features: int,
    group: int,
    zones: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


class LevelsLinear(PackedLinear):
    """A linear layer stored as two planes of bits and float16 levels.

    Buffers:
        codes, selector: (N, ceil(K / 8)) uint8.
        levels: (N, G, 4) float16.
        column_bits: (ceil(K / 8),) uint8, the bitmap of the second zone; (0,) with one zone.
        col_scale: (K,) float16, or None.
        bias: (N,) float, or None.

    Args:
        in_features: K.
        out_features: N.
        group: g, at least 1.
        zones: 1 or 2.
        scaled: 1 if there are column scales, else 0.
        bias: whether a bias is stored.
        dtype: dtype of the bias.
    """

    kind: ClassVar[str] = "levels"
    codes: Tensor
    selector: Tensor
    levels: Tensor
    column_bits: Tensor
    col_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: int,
        zones: int = 1,
        scaled: int = 0,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if group < 1 or zones not in (1, 2):
            raise ValueError(f"group {group}, zones {zones}")
        self.group, self.zones, self.scaled = group, zones, scaled
        width = packed_width(in_features)
        stored = {
            "codes": code_buffer(out_features, in_features),
            "selector": code_buffer(out_features, in_features),
            "levels": half_buffer(out_features, group_count(in_features, group, zones), 4),
            "column_bits": Buffer((width if zones == 2 else 0,), torch.uint8),
            "col_scale": half_buffer(in_features) if scaled else None,
        }
        self._allocate(in_features, out_features, stored, bias, dtype)

    def layout(self) -> dict[str, int]:
        """{"group": g, "zones": 1 or 2, "scaled": 0 or 1}."""
        return {"group": self.group, "zones": self.zones, "scaled": self.scaled}

    @classmethod
    def from_solution(cls, solution: Levels, bias: Tensor | None = None) -> "LevelsLinear":
        """Pack a solver's result.

        Args:
            solution: levels (N, G, 4) and codes (N, K).
            bias: (N,) or None.

        Raises:
            LitBinqError: a code is not one of 0 to 3, or a level or scale does not fit float16.
        """
        s = solution.balanced()
        N, K = s.codes.shape
        if s.codes.numel() and int(s.codes.max()) > 3:
            raise LitBinqError(f"levels: got code {int(s.codes.max())}, expected codes from 0 to 3")
        A, B = bits_of(s.codes)
        tensors = {"codes": pack_signs(A), "selector": pack_signs(B), "levels": half_scales(s.levels, "levels")}
        if s.salient is not None:
            tensors["column_bits"] = pack_signs(s.salient[None].float() - 0.5)[0]
        if s.c is not None:
            tensors["col_scale"] = half_scales(s.c, "col_scale")
        return cls._holding(K, N, bias, tensors, group=s.group, zones=s.zones, scaled=int(s.c is not None))

    def solution(self) -> Levels:
        """The stored weight, unpacked to float32."""
        K = self.in_features
        salient = unpack_signs(self.column_bits[None], K)[0] > 0 if self.zones == 2 else None
        code = (unpack_signs(self.codes, K) > 0).byte() + 2 * (unpack_signs(self.selector, K) > 0).byte()
        c = None if self.col_scale is None else self.col_scale.float()
        return Levels(self.levels.float(), code, self.group, salient, c)

    def latent(self, train_codes: bool, target: Tensor | None = None) -> "LatentLevelsLinear":
        """The trainable twin; see the base class."""
        return LatentLevelsLinear(self.solution(), self.bias, train_codes, target)

    def operands(self) -> list[tuple[str, list[Tensor]]]:
        """One product. Column scales are not among its operands: they are multiplied into x before."""
        stored = [self.codes, self.selector, self.levels, self.column_bits]
        return [("LevelsMatMul", self._with_bias(stored))]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.col_scale is not None:
            x = x * self.col_scale.to(x.dtype)
        return levels_matmul(
            x,
            self.codes,
            self.selector,
            self.levels,
            self.column_bits,
            self.bias,
            self.in_features,
            self.group,
            self.zones,
        )


def bits_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of plane A and of plane B, -1 or +1 float32, of codes 0 to 3 of any shape."""
    return (codes & 1).float() * 2 - 1, (codes >> 1).float() * 2 - 1


class LatentLevelsLinear(LatentLinear):
    """The trainable twin: levels are parameters, the two bits are signs of latents.

    With s_A, s_B = +-1 the level that a code picks is m0 + m1 s_A + m2 s_B + m3 s_A s_B, where m (N, G, 4) follows
    linearly from the four levels. So written it has a gradient for the signs: half of what flipping one would change.

    Args:
        solution: the start.
        bias: (N,) or None; kept as it is.
        train_codes: whether codes may change.
        target: (N, K), sets the size of the latents: the distance of a target to the middle between its level and
            the one with this bit flipped.
    """

    salient: Tensor | None
    mix: Tensor

    def __init__(self, solution: Levels, bias: Tensor | None, train_codes: bool, target: Tensor | None = None) -> None:
        super().__init__()
        s = solution
        self.out_features, self.in_features = s.codes.shape
        self.group, self.train_codes = s.group, train_codes
        A, B = bits_of(s.codes)
        distance_A = distance_B = None
        if train_codes and target is not None:
            here = s.dense()
            flipped = [Levels(s.levels, s.codes ^ bit, s.group, s.salient, s.c).dense() for bit in (1, 2)]
            distance_A, distance_B = (target - (here + other) / 2 for other in flipped)
        self.v_A, self.v_B = latent_codes(A, train_codes, distance_A), latent_codes(B, train_codes, distance_B)
        self.levels = nn.Parameter(s.levels.detach().float().clone())
        self.c = None if s.c is None else nn.Parameter(s.c.detach().float().clone())
        self.register_buffer("salient", None if s.salient is None else s.salient.clone())
        s_A, s_B = bits_of(torch.arange(4, device=s.levels.device))
        self.register_buffer("mix", torch.stack((torch.ones_like(s_A), s_A, s_B, s_A * s_B)) / 4, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def code_parameters(self) -> list[nn.Parameter]:
        """The latents of both planes, or nothing."""
        return [self.v_A, self.v_B] if self.train_codes else []

    def scale_parameters(self) -> list[nn.Parameter]:
        """Levels, and column scales if there are any."""
        return [self.levels] if self.c is None else [self.levels, self.c]

    def solution(self) -> Levels:
        """The current weight."""
        codes = (signs(self.v_A.detach()) > 0).byte() + 2 * (signs(self.v_B.detach()) > 0).byte()
        c = None if self.c is None else self.c.detach()
        return Levels(self.levels.detach(), codes, self.group, self.salient, c)

    def pack(self) -> LevelsLinear:
        """The current weight, packed."""
        return LevelsLinear.from_solution(self.solution(), self.bias)

    def _by_column(self, m: Tensor) -> Tensor:
        """(N, G) to (N, K). Expanded rather than gathered: the backward pass is a plain sum, the same every time."""
        N, K, g = self.out_features, self.in_features, self.group

        def spread(zone: Tensor) -> Tensor:
            return zone[:, :, None].expand(-1, -1, g).reshape(N, -1)[:, :K]

        return spread(m) if self.salient is None else torch.where(self.salient, spread(m[:, 1::2]), spread(m[:, ::2]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        m0, m1, m2, m3 = (self._by_column(m) for m in (self.levels @ self.mix.T).unbind(-1))
        s_A, s_B = straight_through(self.v_A), straight_through(self.v_B)
        weight = m0 + m1 * s_A + (m2 + m3 * s_A) * s_B
        return nn.functional.linear(x if self.c is None else x * self.c, weight, self.bias)
