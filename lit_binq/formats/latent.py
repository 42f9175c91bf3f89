"""The trainable twin of the row x column format, used only while a block or a model is tuned.

Legend: v (N, K) latent codes whose signs are B; r (N,), c (K,) scales; W^ = diag(r) sign(v) diag(c).

The forward pass always uses the signs. Backward, the signs pass the gradient on unchanged (straight-through).
Latents start at |T| o B / mean |T|: their size says how surely a code is what it is, and one learning rate
serves every layer.
"""

import torch
from torch import Tensor, nn

from lit_binq.formats.row_column import BinaryLinear, RowColumn


class _Sign(torch.autograd.Function):
    """sign(v) with sign(0) = +1, and the identity as its gradient."""

    @staticmethod
    def forward(ctx: object, v: Tensor) -> Tensor:
        return torch.where(v >= 0, 1.0, -1.0).to(v.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


class LatentBinaryLinear(nn.Module):
    """A row x column linear layer with trainable scales and, if asked for, trainable codes.

    Args:
        solution: r (N,), c (K,), B (N, K).
        confidence: (N, K) non-negative size of the latents, or None for frozen codes.
        bias: (N,) or None; kept as it is.
    """

    bias: Tensor | None

    def __init__(self, solution: RowColumn, confidence: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = solution.B.shape
        self.train_codes = confidence is not None
        v = solution.B.float()
        if confidence is not None:
            v = v * (confidence / confidence.mean().clamp_min(1e-30)).clamp_min(1e-6)
        self.v = nn.Parameter(v, requires_grad=self.train_codes)
        self.r = nn.Parameter(solution.r.detach().float().clone())
        self.c = nn.Parameter(solution.c.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_packed(cls, layer: BinaryLinear, confidence: Tensor | None = None) -> "LatentBinaryLinear":
        """The trainable twin of a packed layer; `confidence` as in the constructor."""
        return cls(layer.solution(), confidence, layer.bias)

    def solution(self) -> RowColumn:
        """The current weight."""
        B = torch.where(self.v.detach() >= 0, 1.0, -1.0)
        return RowColumn(self.r.detach(), self.c.detach(), B)

    def pack(self) -> BinaryLinear:
        """The current weight, packed. Raises LitBinqError where a scale does not fit float16."""
        return BinaryLinear.from_solution(self.solution(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        # With frozen codes, scaling x and y instead of the weight spares the weight's gradient, a third of backward.
        if self.train_codes:
            weight = _Sign.apply(self.v) * self.r[:, None] * self.c[None, :]
            return nn.functional.linear(x, weight, self.bias)
        y = nn.functional.linear(x * self.c, self.v) * self.r
        return y if self.bias is None else y + self.bias
