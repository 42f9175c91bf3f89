"""A Hugging Face causal language model with packed linears as an ONNX graph.

The graph has dynamic batch b, sequence s and past p lengths:

    inputs   input_ids (b, s) int64, attention_mask (b, p + s) int64, position_ids (b, s) int64,
             past_key_values.N.key / .value (b, heads, p, head_dim) float32
    outputs  logits (b, s, V) float32, present.N.key / .value (b, heads, p + s, head_dim) float32

Knows torch's exporter and models; nothing of files.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import DynamicCache, PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq_onnx.build.graph import name_lengths
from lit_binq_onnx.build.operators import translation_table
from lit_binq_onnx.build.rotary import traceable_rotary
from lit_binq_onnx.functions import OPSET
from lit_binq_onnx.runtime.session import cache_names


class FlatCache(nn.Module):
    """A causal language model whose cache goes in and out as a flat list of tensors.

    Args:
        model: any Hugging Face causal language model that takes a DynamicCache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """One pass.

        Args:
            input_ids: (b, s) int64.
            attention_mask: (b, p + s) int64, 0 at padding.
            position_ids: (b, s) int64.
            past: [key 0, value 0, key 1, ...], each (b, heads, p, head_dim) float32.

        Returns:
            logits (b, s, V), then the new cache in the order of `past`, p + s long.
        """
        cache = DynamicCache()  # without a config: full layers, so that sliding windows are left to the mask
        for i in range(0, len(past), 2):
            cache.update(past[i], past[i + 1], i // 2)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, *flat_cache(out.past_key_values)


def flat_cache(cache: DynamicCache) -> list[Tensor]:
    """[key 0, value 0, key 1, ...], each (b, heads, length, head_dim).

    Raises:
        ValueError: a layer of the cache is of another kind (a state space, say) or was never filled.
    """
    tensors: list[Tensor] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ValueError(f"{type(layer).__name__} holds no keys and values")
        tensors += [keys, values]
    return tensors


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    ids = torch.zeros(1, 1, dtype=torch.long)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(), use_cache=True)
    return [(t.shape[1], t.shape[3]) for t in flat_cache(out.past_key_values)]


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, head_dim) of every cache tensor, in the order of `flat_cache`, from one pass over one token.

    A pass of shapes alone, as tracing takes: nothing is unpacked or multiplied, unless the model asks for values.

    Raises:
        LitBinqError: the model keeps no key-value cache, or not one for each block.
    """
    try:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return _cache_shapes(model)
        except DataDependentOutputException:  # a dynamic rotary embedding looks at the positions themselves
            return _cache_shapes(model)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise LitBinqError(
            f"export: {type(model).__name__} keeps no key-value cache of the usual kind "
            f"({' '.join(str(error).split())}); expected a decoder with attention in every block: "
            "change the option `model` of the fit"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter says and no user can act on."""
    # "torchvision is not installed", once an operator of torchvision; every initializer that was merged
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch copies its own tree specifications through a class that it has deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            # Raised inside torch when an exported program takes its own inputs apart.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(model: PreTrainedModel) -> ir.Model:
    """The model as an ONNX graph: names, dynamic lengths and packed nodes as in this file's head.

    Args:
        model: float32, evaluation mode, on the CPU.

    Raises:
        LitBinqError: torch cannot trace or translate the model.
    """
    shapes = cache_shapes(model)
    b, s, p = 2, 3, 5  # all different and above 1, so that no length is taken for another or for a constant
    example = (
        torch.zeros(b, s, dtype=torch.long),
        torch.ones(b, p + s, dtype=torch.long),
        torch.arange(p, p + s).expand(b, s).clone(),
        [torch.zeros(b, heads, p, size) for heads, size in shapes],
    )
    # Which lengths are equal, that the mask's is a sum, and the longest there may be (tables of positions, causal masks
    # of a fixed size) torch works out itself.
    free = torch.export.Dim.DYNAMIC
    dynamic = ({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free} for _ in shapes])
    inputs, outputs = cache_names(len(shapes) // 2)
    try:
        with torch.no_grad(), quiet(), traceable_rotary(model):
            program = torch.export.export(FlatCache(model).eval(), example, dynamic_shapes=dynamic, strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=["input_ids", "attention_mask", "position_ids", *inputs],
                output_names=["logits", *outputs],
                custom_translation_table=translation_table(),
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the model's own code raises under tracing
        raise LitBinqError(
            f"export: torch cannot trace {type(model).__name__} ({' '.join(str(error).split())[:300]}); "
            "expected a model that torch.export accepts: change the option `model` of the fit"
        ) from error
    if exported is None:
        raise LitBinqError("export: torch.onnx.export returned no program; expected one: use torch 2.11 or newer")
    _name_lengths(exported.model.graph)
    return exported.model


def _name_lengths(graph: ir.Graph) -> None:
    """Name torch's symbols as in this file's head. Where torch needs no equality, equal lengths have several."""
    names: dict[str, str] = {}
    for number, value in enumerate(graph.inputs):
        axes = ("batch", "past + sequence" if number == 1 else "sequence") if number < 3 else ("batch", "", "past")
        for size, name in zip(() if value.shape is None else value.shape, axes, strict=False):
            if name and isinstance(size, ir.SymbolicDim):
                names.setdefault(str(size), name)
    name_lengths(graph, names)
