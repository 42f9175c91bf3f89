"""Weights of published baselines: kept as dense float32, their bits counted rather than stored.

Nobody deploys a baseline, so it needs no codes in a file, no trainable form and no operator: only the weight that it
multiplies by, whose scales are rounded as its paper stores them, and how many bits that paper's format would take.
"""

from abc import abstractmethod
from typing import ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import Buffer, PackedLinear, Solution, register


class CountedSolution(Solution):
    """An unpacked weight of a baseline's format."""

    @abstractmethod
    def rounded(self) -> Self:
        """The same with scales as float16 holds them. Raises LitBinqError where one does not fit."""

    @abstractmethod
    def stored_bits(self) -> int:
        """Bits that the format would take: codes with their padding to whole bytes, scales, positions."""

    def pack(self, bias: Tensor | None = None) -> "DenseOnlyLinear":
        """The layer that keeps the dense weight; bias (N,) or None. Raises LitBinqError as `rounded`."""
        W = self.rounded().dense().float().contiguous()
        return DenseOnlyLinear._holding(W.shape[1], W.shape[0], bias, {"weight": W}, counted_bits=self.stored_bits())


@register
class DenseOnlyLinear(PackedLinear):
    """A linear layer whose weight is dense, with the bits that its baseline's format would take.

    Buffers:
        weight: (N, K) float32.
        bias: (N,) float, or None.

    Its one option is `counted_bits`, of the whole weight.
    """

    kind: ClassVar[str] = "dense_only"
    deployable: ClassVar[bool] = False
    weight: Tensor
    counted_bits: int

    @classmethod
    def tensors(cls, N: int, K: int, counted_bits: int) -> dict[str, Buffer]:  # type: ignore[override]
        """The buffers; see the base class."""
        return {"weight": Buffer((N, K), torch.float32)}

    def stored_bits(self) -> int:
        """Bits that the baseline's format would take; the file holds 32 for each weight."""
        return self.counted_bits

    def dequantize(self) -> Tensor:
        """The dense float32 weight (N, K)."""
        return self.weight

    def solution(self) -> NoReturn:
        """Nothing is left of the baseline's format. Raises LitBinqError."""
        self._refuse("taken apart")

    def latent(self, train_codes: bool, target: Tensor | None = None) -> NoReturn:
        """There is no trainable form. Raises LitBinqError."""
        self._refuse("tuned")

    def products(self) -> NoReturn:
        """There is no operator. Raises LitBinqError."""
        self._refuse("exported")

    def _refuse(self, what: str) -> NoReturn:
        raise LitBinqError(
            f"format dense_only cannot be {what}: it keeps a baseline's dense weight; expected a solver such as "
            "RowColumnSolver in the option `closed_form.solver`"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
