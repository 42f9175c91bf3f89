"""How large a model is, in bits.

true_bits         bits of every weight matrix inside the blocks / their weights: a packed one with all its tensors
                  (codes, padding, scales; of a published baseline, kept dense, what its format would take), one that
                  stays at full precision with its own bits a weight, 16 or 32
file_bits         bits of all files of the packed folder / weights of the whole dense model
activation_bits   bits of a value that enters a packed linear
"""

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq.formats.activations import mean_bits
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import packed_linears
from lit_binq.formats.unquantized import stored_bits
from lit_binq.models.blocks import find_blocks
from lit_binq.utils.json_records import DIAGNOSTICS


def block_linear_weights(model: nn.Module) -> int:
    """Number of weights (sum of N K) of all packed linears."""
    return sum(m.in_features * m.out_features for m in packed_linears(model).values())


def true_bits(model: PreTrainedModel, blocks: Iterable[nn.Module] | None = None) -> float:
    """Stored bits for each weight inside the blocks.

    Packed linears count with codes, their padding and scales. Every other matrix there, a linear that is never called,
    a router, a convolution, counts with the bits that it is stored with (`lit_binq.formats.unquantized`). Biases and
    norms do not count, nor does what is outside the blocks: embeddings and head.

    Args:
        model: a calibrated model.
        blocks: of these blocks of it alone; None takes all, and any packed linear outside them.

    Raises:
        LitBinqError: nothing is packed.
    """
    inside = list(find_blocks(model) if blocks is None else blocks)
    packed = [m for part in ([model] if blocks is None else inside) for m in packed_linears(part).values()]
    if not packed:
        raise LitBinqError("true_bits: the model has no packed linear; expected a calibrated model")
    left = left_matrices(inside)
    bits = sum(m.stored_bits() for m in packed) + sum(p.numel() * stored_bits(model, p) for p in left.values())
    weights = sum(m.in_features * m.out_features for m in packed) + sum(p.numel() for p in left.values())
    return bits / weights


def how_counted(model: nn.Module) -> str:
    """What has to be said behind `true_bits`: nothing, or that a baseline's dense weights take more in the file."""
    return "" if all(m.deployable for m in packed_linears(model).values()) else " (counted, not stored)"


def left_matrices(blocks: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters of two dimensions or more inside blocks, which are what is not packed there, by "number.name"."""
    return {f"{i}.{name}": p for i, block in enumerate(blocks) for name, p in block.named_parameters() if p.dim() > 1}


def activation_bits(model: nn.Module) -> float:
    """Bits of a value that enters a packed linear: the mean over all of them, each counted by its K inputs.

    Inputs that are not quantized count as 16; of others, outlier channels count as 8.

    Raises:
        LitBinqError: the model has no packed linear.
    """
    linears = packed_linears(model).values()
    if not linears:
        raise LitBinqError("activation_bits: the model has no packed linear; expected a calibrated model")
    total = sum(layer_activation_bits(m) * m.in_features for m in linears)
    return total / sum(m.in_features for m in linears)


def layer_activation_bits(layer: PackedLinear) -> float:
    """The same of one layer."""
    layout = layer.layout()
    return mean_bits(layer.in_features, layout.get("activation_bits", 0), layout.get("outliers", 0))


def dense_weights(model: nn.Module) -> int:
    """Number of parameters of the dense model behind `model`; shared ones count once, buffers do not."""
    packed = packed_linears(model).values()
    biases = sum(m.bias.numel() for m in packed if m.bias is not None)
    return block_linear_weights(model) + biases + sum(p.numel() for p in model.parameters())


def file_bits(folder: str | Path) -> float:
    """Bits of all files of a packed folder, for each weight of the dense model.

    Diagnostics of the fit, which lie here if the folder is not named `packed`, are not part of the model.

    Raises:
        LitBinqError: not a packed folder.
    """
    folder, manifest = Path(folder), read_manifest(Path(folder))
    names = manifest.get("files") or [f for f in folder.rglob("*") if f.is_file() and f != folder / DIAGNOSTICS]
    size = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    return 8 * size / int(manifest["dense_weights"])
