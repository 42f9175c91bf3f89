"""Finding the decoder blocks and their linear layers in any Hugging Face causal model, and running one block.

Legend: b windows, T tokens a window, d hidden size.

A block is run with exactly the arguments the model itself passes, recorded once (lit_binq.models.block_calls).
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats.base import LatentLinear, PackedLinear
from lit_binq.models.block_calls import BlockCall as BlockCall
from lit_binq.models.block_calls import Stop, hidden_states, hooked
from lit_binq.models.block_calls import capture_calls as capture_calls
from lit_binq.models.block_calls import run_block as run_block

log = logging.getLogger(__name__)

Layer = TypeVar("Layer", bound=nn.Module)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks: the longest ModuleList whose every entry holds linear layers.

    Raises:
        LitBinqError: there is none, or the model holds nothing this project can quantize.
    """
    best: nn.ModuleList | None = None
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_linears(block) for block in module):
            depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", len(module))
            if len(module) == depth and (best is None or len(module) > len(best)):
                best = module
    if best is None:
        raise LitBinqError(
            f"unknown architecture {type(model).__name__}: found no list of decoder blocks with nn.Linear layers; "
            "expected a decoder-only model such as LLaMA, Mistral, Qwen, Gemma, Phi or OPT: change the option `model`"
        )
    return best


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, PackedLinear))}


def linear_groups(block: nn.Module, hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """Names of a block's linear layers, grouped by shared input, in the order they are called.

    For LLaMA: [q, k, v], [o], [gate, up], [down]. Layers of one group see the same tensor, hence one Gram.

    Args:
        block: a full-precision block.
        hidden: (b, T, d), any hidden states; one window is enough.
        call: the block's other arguments.

    Raises:
        LitBinqError: a linear layer is called twice in one pass (its input is then not one distribution).
    """
    groups: list[tuple[Tensor, list[str]]] = []
    seen: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen:
                raise LitBinqError(
                    f"linear layer {name} is called twice in one block, expected once: this architecture is not "
                    "supported, change the option `model`"
                )
            seen.add(name)
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            else:
                groups.append((args[0], [name]))

        return note

    linears = _linears(block)
    with ExitStack() as stack, torch.no_grad():
        for name, module in linears.items():
            stack.enter_context(hooked(module.register_forward_pre_hook(hook(name))))
        run_block(block, hidden, call)
    if missing := [n for n in linears if n not in seen]:
        log.warning("linear layers never called, left at full precision: %s", ", ".join(missing))
    return [names for _, names in groups]


def require_fitting(model: PreTrainedModel, windows: Tensor, option: str) -> None:
    """Refuse windows (n, T) that a model has no positions or no embeddings for.

    Args:
        model: its configuration says how many positions there are.
        windows: int64 token windows.
        option: named in the error.

    Raises:
        LitBinqError: too long windows, or a token beyond the vocabulary.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise LitBinqError(
            f"{option}: got windows of {windows.shape[1]} tokens, expected at most the model's {positions} positions: "
            f"lower {option}"
        )
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    rows = embeddings.num_embeddings
    if windows.numel() and int(windows.max()) >= rows:
        raise LitBinqError(
            f"tokenizer: it gives token {int(windows.max())}, expected numbers below the model's {rows} embeddings: "
            "model and tokenizer do not belong together"
        )


def embed(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> Tensor:
    """Hidden states that enter the first block: (b, T) int64 -> (b, T, d)."""
    caught: list[Tensor] = []

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(hidden_states(block, args, kwargs))
        raise Stop

    with hooked(blocks[0].register_forward_pre_hook(hook, with_kwargs=True)), torch.no_grad(), suppress(Stop):
        model(input_ids=windows, use_cache=False)
    return caught[0].detach()


def linear_input(block: nn.Module, name: str, hidden: Tensor, call: BlockCall) -> Tensor:
    """The input of linear layer `name` when the block runs on `hidden`; what comes after it is not computed.

    Args:
        block: the block.
        name: dotted name of a linear layer inside it.
        hidden: (b, T, d).
        call: the block's other arguments.

    Returns:
        (b * T, K) or (b, T, K), as the layer receives it.
    """
    return linear_inputs(block, [name], hidden, call)[0]


def linear_inputs(block: nn.Module, names: list[str], hidden: Tensor, call: BlockCall) -> list[Tensor]:
    """The inputs of several layers, in the order in which the block calls them, from one pass; see `linear_input`."""
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        if len(caught) == len(names):
            raise Stop

    with ExitStack() as stack, torch.no_grad(), suppress(Stop):
        for name in names:
            stack.enter_context(hooked(block.get_submodule(name).register_forward_pre_hook(hook)))
        run_block(block, hidden, call)
    return caught


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model itself, on `device`. (transformers wraps `.to` so that type checkers lose its signature.)"""
    nn.Module.to(model, device)
    return model


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `root` has the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def find_layers(root: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Sub-modules of a kind by name, in order; layers inside such a layer belong to it and are not listed."""
    found: dict[str, Layer] = {}
    for name, module in root.named_modules():
        if isinstance(module, kind) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of `module` outside its linear layers and embeddings: norm weights and norm biases."""
    skip = (LatentLinear, PackedLinear, nn.Linear, nn.Embedding)
    # Lists of parameters inside a layer are modules of their own.
    inside = {id(m) for layer in module.modules() if isinstance(layer, skip) for m in layer.modules()}
    return {
        f"{prefix}.{name}" if prefix else name: p
        for prefix, m in module.named_modules()
        if id(m) not in inside
        for name, p in m.named_parameters(recurse=False)
        if p.dim() == 1
    }
