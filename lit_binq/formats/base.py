"""What every stored format of a linear layer promises.

A packed linear stores exactly the tensors it computes with: its buffers are its file, and `true_bits` counts
every one of them. Nothing above formats/ is known here.
"""

from abc import abstractmethod

from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer y = x W^T + b whose weight is stored packed.

    Sub-classes register every stored tensor as a buffer; `bias` (N,) or None is not part of the weight's bits.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The dense float32 weight (N, K) this layer multiplies by."""

    @abstractmethod
    def weight_buffers(self) -> dict[str, Tensor]:
        """Every stored tensor that makes up the weight, by buffer name."""

    def stored_bits(self) -> int:
        """Bits of every stored tensor of the weight: codes with their padding, scales, everything."""
        return sum(t.numel() * t.element_size() * 8 for t in self.weight_buffers().values())

    def true_bits(self) -> float:
        """Stored bits for each weight of the dense matrix."""
        return self.stored_bits() / (self.in_features * self.out_features)
