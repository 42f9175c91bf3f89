"""The two-plane layer: y = x^ W^^T + b, with two bits a weight and, if wanted, the input quantized.

Legend: N rows, K columns, g columns a group, P outlier columns, A, B (N, K) bits, L numbers a row and group; what they
mean, and the stored order of columns: lit_binq.formats.two_plane.solution.

True bits: 2 + 16 L / g, and with outliers a bitmap of K bits, with 4-bit inputs 5 float16 scales, with static ranges
4 float32.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats.activations import plain_scales, quantize
from lit_binq.formats.base import Buffer, PackedLinear, code_buffer, half_buffer, half_scales, register
from lit_binq.formats.grouped import check_group, group_count
from lit_binq.formats.operators import Product, operator
from lit_binq.formats.packing import pack_signs, packed_width, unpack_signs
from lit_binq.formats.two_plane import device as two_plane_device
from lit_binq.formats.two_plane.latent import LatentTwoPlaneLinear
from lit_binq.formats.two_plane.solution import (
    InputFormat,
    TwoPlane,
    by_code,
    four_levels,
    marked_first,
    require_same,
    stored_order,
)

__all__ = ["InputFormat", "TwoPlane", "TwoPlaneLinear", "two_plane_matmul"]


@operator(
    "TwoPlaneMatMul",
    codes=torch.uint8,
    selector=torch.uint8,
    levels=torch.float16,
    outlier_bits=torch.uint8,
    input_scales=torch.float16,
    input_range=torch.float32,
)
def two_plane_matmul(
    x: Tensor,
    codes: Tensor,
    selector: Tensor,
    levels: Tensor,
    outlier_bits: Tensor,
    input_scales: Tensor,
    input_range: Tensor,
    bias: Tensor | None,
    in_features: int,
    group: int,
    activation_bits: int,
    outliers: int,
) -> Tensor:
    """y = quantized(x in stored order) W^^T + bias, in x's dtype.

    Args:
        x: (..., K) float, columns in the input's order.
        codes: (N, ceil(K / 8)) uint8, the bits A in stored order, see `lit_binq.formats.packing`.
        selector: (N, ceil(K / 8)) uint8, the bits B.
        levels: (N, ceil(K / g), L) float16, L from 2 to 4, see `two_plane_solution`.
        outlier_bits: (ceil(K / 8),) uint8, a bitmap of the outlier columns; (0,) if there are none.
        input_scales: (5,) float16 zeta, rho_0..rho_3; (0,) unless activation_bits is 4.
        input_range: (4,) float32 for static ranges, else (0,).
        bias: (N,) float or None.
        in_features: K.
        group: g.
        activation_bits: 0, 4 or 8.
        outliers: P.

    Returns:
        (..., N), dtype of x.
    """
    if outliers:
        x = x.index_select(-1, marked_first(unpack_signs(outlier_bits[None], in_features)[0] > 0))
    if two_plane_device.usable(x, group, activation_bits, outliers):
        return two_plane_device.matmul(
            x,
            codes,
            selector,
            levels,
            input_scales,
            input_range,
            bias,
            in_features,
            group,
            activation_bits,
            outliers,
        )
    if activation_bits:
        x = quantize(x, bits=activation_bits, outliers=outliers, scales=input_scales, input_range=input_range)
    code = (unpack_signs(codes, in_features) > 0).long() + 2 * (unpack_signs(selector, in_features) > 0).long()
    W = by_code(four_levels(levels.float()), code, group).to(x.dtype)
    return nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


@register
class TwoPlaneLinear(PackedLinear):
    """A linear layer stored as two planes of bits and float16 levels, with how its input is quantized.

    Buffers: codes, selector, levels, outlier_bits, input_scales, input_range as `two_plane_matmul` takes them, and
    bias (N,) float or None. `order` (K,) int64, the stored order, follows from the bitmap and is not stored.

    Its options:
        group: g; LitBinqError unless it is a multiple of 8 from 8 to 1024.
        levels: L.
        activation_bits: 0, 4 or 8.
        outliers: P, 0 or a multiple of 8, fewer than K.
        static: 1 if ranges of the input are stored, else 0.
    """

    kind: ClassVar[str] = "two_plane"
    codes: Tensor
    selector: Tensor
    levels: Tensor
    outlier_bits: Tensor
    input_scales: Tensor
    input_range: Tensor
    order: Tensor
    group: int
    activation_bits: int
    outliers: int

    @classmethod
    def tensors(  # type: ignore[override]
        cls, N: int, K: int, group: int, levels: int, activation_bits: int, outliers: int, static: int
    ) -> dict[str, Buffer]:
        """The buffers; see the base class."""
        check_group(group)
        if levels not in (2, 3, 4) or activation_bits not in (0, 4, 8) or static not in (0, 1):
            raise ValueError(f"levels {levels}, activation_bits {activation_bits}, static {static}")
        if outliers % 8 or not 0 <= outliers < max(K, 1):
            raise ValueError(f"{outliers} outliers of {K} columns, expected a multiple of 8, fewer than all")
        return {
            "codes": code_buffer(N, K),
            "selector": code_buffer(N, K),
            "levels": half_buffer(N, group_count(K, group), levels),
            "outlier_bits": Buffer((packed_width(K) if outliers else 0,), torch.uint8),
            "input_scales": half_buffer(5 if activation_bits == 4 else 0),
            "input_range": Buffer((4 if static else 0,), torch.float32),
        }

    @classmethod
    def derived(cls, N: int, K: int, **options: int) -> dict[str, Tensor]:
        """The stored order."""
        return {"order": torch.arange(K)}

    def layout(self) -> dict[str, int]:
        """The options, with the inputs as they are quantized at present."""
        return self._options | {"activation_bits": self.activation_bits, "static": int(len(self.input_range) > 0)}

    @classmethod
    def from_solution(cls, solution: TwoPlane, bias: Tensor | None = None) -> "TwoPlaneLinear":
        """Pack a solver's result.

        Args:
            solution: levels (N, G, L) and codes (N, K).
            bias: (N,) or None.

        Raises:
            LitBinqError: a code is not one of 0 to 3, a level or scale does not fit float16, or the input's format is
                wrong.
        """
        N, K = solution.codes.shape
        if solution.codes.numel() and int(solution.codes.max()) > 3:
            raise LitBinqError(f"two_plane: got code {int(solution.codes.max())}, expected codes from 0 to 3")
        half = half_scales(solution.levels, "levels")
        s = replace(solution, levels=half.to(solution.levels.dtype)).canonical()
        P = len(s.inputs.outliers)
        s.inputs.check(K)
        A, B = ((s.codes >> bit & 1).float() * 2 - 1 for bit in (0, 1))
        tensors = {"codes": pack_signs(A), "selector": pack_signs(B), "levels": s.levels.half()}
        if P:
            tensors["order"] = stored_order(s.inputs.outliers.to(s.codes.device), K)
            marked = -torch.ones(1, K, device=s.codes.device)
            marked[0, tensors["order"][:P]] = 1
            tensors["outlier_bits"] = pack_signs(marked)[0]
        numbers = {"group": s.group, "levels": s.levels.shape[-1], "outliers": P}
        layer = cls._holding(K, N, bias, tensors, **numbers, activation_bits=0, static=0)
        layer.set_inputs(s.inputs)
        return layer

    def set_inputs(self, inputs: InputFormat) -> None:
        """Quantize the input otherwise from now on.

        Args:
            inputs: its outliers are those the weight was solved for.

        Raises:
            LitBinqError: other outliers, or a format that cannot be stored.
        """
        inputs.check(self.in_features)
        require_same(self.order[: self.outliers], inputs.outliers)
        device, bits = self.codes.device, inputs.activation_bits
        scales, static = torch.empty(0), torch.empty(0)
        if bits == 4:
            scales = plain_scales() if inputs.scales is None else inputs.scales
        if bits and inputs.range is not None:
            static = inputs.range
        half = half_scales(scales, "input_scales").to(device)
        self.activation_bits, self.input_scales = bits, half
        self.input_range = static.detach().to(device, torch.float32)

    def refresh(self) -> None:
        """Derive the stored order from the bitmap: after the buffers were filled.

        Raises:
            ValueError: a bitmap that does not mark as many columns as the layout says.
        """
        if self.outliers:
            marked = unpack_signs(self.outlier_bits[None], self.in_features)[0] > 0
            if int(marked.sum()) != self.outliers:
                raise ValueError(f"outlier_bits marks {int(marked.sum())} columns, expected {self.outliers}")
            self.order = marked_first(marked)

    def inputs(self) -> InputFormat:
        """How the input is quantized, scales as float32; None where they are the plain ones."""
        scales = self.input_scales.float() if len(self.input_scales) else None
        if scales is not None and torch.equal(self.input_scales, plain_scales().half().to(scales.device)):
            scales = None
        static = self.input_range.clone() if len(self.input_range) else None
        return InputFormat(self.activation_bits, self.order[: self.outliers].clone(), scales, static)

    def solution(self) -> TwoPlane:
        """The stored weight, unpacked to float32."""
        A, B = (unpack_signs(plane, self.in_features) > 0 for plane in (self.codes, self.selector))
        return TwoPlane(self.levels.float(), A.byte() + 2 * B.byte(), self.group, self.inputs())

    def dequantize(self) -> Tensor:
        """(N, K) float32, columns in the input's order."""
        return self.solution().dense()

    def latent(self, train_codes: bool, target: Tensor | None = None) -> LatentTwoPlaneLinear:
        """The trainable layer; see the base class."""
        return LatentTwoPlaneLinear(self.solution(), self.bias, train_codes, target)

    def products(self) -> list[Product]:
        """One product."""
        numbers = {
            "in_features": self.in_features,
            "group": self.group,
            "activation_bits": self.activation_bits,
            "outliers": self.outliers,
        }
        return [Product("TwoPlaneMatMul", list(self.weight_buffers().values()), numbers, self.bias)]
