"""What every stored format of a linear layer promises, in its three states.

    Solution       unpacked: what a solver returns, float tensors
    PackedLinear   stored: its buffers are its file, and `true_bits` counts every one of them
    LatentLinear   trainable, while a block or a model is tuned

    solver --> Solution --pack--> PackedLinear --latent--> LatentLinear --pack--> PackedLinear

A packed linear stores exactly the tensors it computes with. Nothing above formats/ is known here.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats.operators import Product, multiply
from lit_binq.formats.packing import packed_width


class Solution(ABC):
    """An unpacked weight of some format."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight (N, K) it stands for."""

    @abstractmethod
    def pack(self, bias: Tensor | None = None) -> "PackedLinear":
        """The layer that stores it.

        Args:
            bias: (N,) or None.

        Raises:
            LitBinqError: a scale does not fit float16.
        """


class LatentLinear(nn.Module):
    """A linear layer in training: its codes are signs of latents, its scales are parameters."""

    bias: Tensor | None

    @abstractmethod
    def code_parameters(self) -> list[nn.Parameter]:
        """Latent codes of mean size about 1; empty where codes are frozen."""

    @abstractmethod
    def scale_parameters(self) -> list[nn.Parameter]:
        """Scales (and means, levels); their learning rates follow their mean size."""

    @abstractmethod
    def pack(self) -> "PackedLinear":
        """The current weight, packed. Raises LitBinqError where a scale does not fit float16."""


class Buffer(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def code_buffer(rows: int, columns: int) -> Buffer:
    """One bit for each of rows x columns weights, rows padded to whole bytes."""
    return Buffer((rows, packed_width(columns)), torch.uint8)


def half_buffer(*shape: int) -> Buffer:
    """Scales."""
    return Buffer(shape, torch.float16)


FORMATS: dict[str, type["PackedLinear"]] = {}
"""Every format that a packed folder may hold, by the name it has there."""


L = TypeVar("L", bound="type[PackedLinear]")


def register(layer: L) -> L:
    """Make a format known by its `kind`: a class decorator."""
    FORMATS[layer.kind] = layer
    return layer


class PackedLinear(nn.Module):
    """A linear layer y = x W^T + b whose weight is stored packed, and the one description of its format.

    A format says its `kind`, which `tensors` it stores, and which `products` a pass is made of; from these follow the
    constructor, the entry in a packed folder, the bits, the forward pass, and the nodes of an exported model. What it
    stores and `bias` (N,) or None are buffers; the bias is not part of the weight's bits. What can be derived is a
    buffer that is not persistent: no file holds it, no bit counts it.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias is stored.
        dtype: dtype of the bias.
        options: what beyond K and N fixes the tensors, see the format's `tensors`; each is an attribute, too, unless a
            tensor has its name.

    Raises:
        LitBinqError, TypeError, ValueError: options that are not the format's.
    """

    kind: ClassVar[str]
    deployable: ClassVar[bool] = True
    """Whether it stores what it counts, and can be tuned and exported."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self._options = in_features, out_features, options
        stored = self.tensors(out_features, in_features, **options)
        derived = self.derived(out_features, in_features, **options)
        for name in options.keys() - stored.keys() - derived.keys():
            setattr(self, name, options[name])
        for name, buffer in stored.items():
            self.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        for name, tensor in derived.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    @classmethod
    @abstractmethod
    def tensors(cls, N: int, K: int, **options: int) -> dict[str, Buffer]:
        """Shape and dtype of every stored tensor of an N x K weight, by buffer name; checks the options."""

    @classmethod
    def derived(cls, N: int, K: int, **options: int) -> dict[str, Tensor]:
        """Tensors that follow from the stored ones, by buffer name, as they are before there is anything to follow."""
        return {}

    @classmethod
    def _holding(
        cls, in_features: int, out_features: int, bias: Tensor | None, tensors: dict[str, Tensor], **layout: int
    ) -> Self:
        """A layer that stores `tensors`, by buffer name, and a copy of `bias` (N,); it is where the tensors are."""
        dtype = torch.float32 if bias is None else bias.dtype
        layer = cls(in_features, out_features, bias is not None, dtype, **layout)
        layer.to(next(iter(tensors.values())).device)
        for name, tensor in tensors.items():
            setattr(layer, name, tensor)
        if bias is not None:
            layer.bias = bias.detach().clone()
        return layer

    def layout(self) -> dict[str, int]:
        """What beyond K and N fixes the shapes of the buffers: a group size, a rank. JSON keeps it."""
        return dict(self._options)

    @abstractmethod
    def latent(self, train_codes: bool, target: Tensor | None = None) -> LatentLinear:
        """The trainable layer.

        Args:
            train_codes: whether codes may change.
            target: (N, K) dense weight that the codes were made from: latents far from zero then stand for codes
                that are surely right. None gives every latent the same size.
        """

    @abstractmethod
    def solution(self) -> Solution:
        """The stored weight, unpacked to float32."""

    def dequantize(self) -> Tensor:
        """The dense float32 weight (N, K) this layer multiplies by."""
        return self.solution().dense()

    def weight_buffers(self) -> dict[str, Tensor]:
        """Every stored tensor that makes up the weight, by buffer name."""
        stored = self.state_dict().keys() - {"bias"}
        return {name: tensor for name, tensor in self.named_buffers() if name in stored}

    @abstractmethod
    def products(self) -> list[Product]:
        """The operator calls of one forward pass, in order."""

    def operands(self) -> list[tuple[str, list[Tensor]]]:
        """The same as nodes of an exported model: (operator's name, the stored tensors it reads, in order)."""
        return [(product.operator, product.operands()) for product in self.products()]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return multiply(self.products(), x)

    def refresh(self) -> None:
        """Derive again whatever follows from the stored tensors; call it after they were filled.

        Raises:
            ValueError: the stored tensors contradict each other.
        """

    def stored_bits(self) -> int:
        """Bits of every stored tensor of the weight: codes with their padding, scales, everything."""
        return sum(t.numel() * t.element_size() * 8 for t in self.weight_buffers().values())

    def true_bits(self) -> float:
        """Stored bits for each weight of the dense matrix."""
        return self.stored_bits() / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        """Shape and true bits, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, true_bits={self.true_bits():.3f}"


def half_scales(scales: Tensor, name: str) -> Tensor:
    """Scales of any shape as float16.

    Raises:
        LitBinqError: a value that float16 cannot hold.
    """
    half = scales.detach().half()
    if not torch.isfinite(half).all():
        raise LitBinqError(
            f"{name} has values that float16 cannot hold (not finite or above 65504); "
            "expected finite scales: check the weights of this layer and raise the option `shrinkage`"
        )
    return half


def parse_layout(entry: Any) -> tuple[str, dict[str, int]]:
    """Format name and layout of an entry of a packed folder: {"format": name, layout...}.

    Raises:
        LitBinqError: not such an entry.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise LitBinqError(f'got {entry!r:.60}, expected an object like {{"format": "row_column"}}')
    layout = {k: v for k, v in entry.items() if k != "format"}
    for key, value in layout.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
            raise LitBinqError(f"{key!r:.40} is {value!r:.40}, expected a whole number that can be one of a matrix")
    return entry["format"], layout
