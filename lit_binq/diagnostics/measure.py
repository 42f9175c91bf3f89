"""Diagnostics of a block that was just quantized: how far it is from full precision, and in which way.

Legend: W (N, K) full-precision weight of a linear layer, W^ the quantized one; x, x~ (n, T, d) the block's inputs in
the full-precision and in the quantized stream, or a linear layer's (T, K); y, y^ the block's outputs.

A linear layer's x is its input inside the full-precision block run on x, its x~ the input inside the quantized block
run on x~: what lies before it in the block is quantized too. Everything is measured window by window in full float32,
sums are kept in float64. Nothing here talks to other ranks: each rank measures the windows it is given.

Source of the measures: arXiv 2512.21651. Deviations: outputs are without the bias (it is the same on both sides);
cosines are averaged over tokens. Directions' effective rank is ours.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_binq.diagnostics.similarity import (
    attention_divergence,
    block_error_sums,
    effective_rank,
    token_error_sums,
    token_similarity_error,
)
from lit_binq.errors import LitBinqError
from lit_binq.models.attention_maps import NoAttentionMaps, attention_maps
from lit_binq.models.blocks import BlockCall, run_block
from lit_binq.utils.files import finite
from lit_binq.utils.json_records import BlockLosses, BlockMeasures, EffectiveRanks, LinearMeasures

log = logging.getLogger(__name__)


@dataclass
class DiagnosticsOptions:
    """What is measured of each block while a model is calibrated, and kept in diagnostics.json.

    Attributes:
        windows: windows to measure on; 0 measures nothing.
        probe: quantize each linear layer alone by several methods and measure the block's loss; takes about one
            forward pass of the block for each window, layer and method, and the solving of each.
        attention: compare attention maps; takes memory for two sets of heads x T x T numbers.

    Raises:
        LitBinqError: a negative number of windows, or a probe on none.
    """

    windows: int = 0
    probe: bool = False
    attention: bool = True

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise LitBinqError(f"diagnostics.windows: got {self.windows}, expected a whole number >= 0 (0 is off)")
        if self.probe and not self.windows:
            raise LitBinqError(
                "diagnostics.probe: got true with no windows to measure on, expected `diagnostics.windows` above 0"
            )


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Full float32 without gradients inside, whatever precision the calibration runs in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_of(module: nn.Module) -> torch.device:
    """Where a block's parameters are."""
    return next(module.parameters()).device


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight (N, K) float32 a packed or plain linear layer multiplies by.

    Raises:
        ValueError: neither; a layer in training has to be packed first, so that what is stored is measured.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight.detach().float()
    dequantize = getattr(linear, "dequantize", None)
    if not callable(dequantize):
        raise ValueError(f"diagnostics: got a layer of kind {type(linear).__name__}, expected a packed one")
    weight: Tensor = dequantize()
    return weight.float()


def linear_inputs(
    block: nn.Module, names: list[str], hidden: Tensor, call: BlockCall
) -> tuple[dict[str, Tensor], Tensor]:
    """One pass of a block: inputs (tokens, K) of the named layers that were called once, and the output (1, T, d)."""
    caught: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught[name].append(args[0].flatten(0, -2))

        return note

    with ExitStack() as stack:
        for name in names:
            stack.callback(block.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        output = run_block(block, hidden, call)
    return {name: inputs[0] for name, inputs in caught.items() if len(inputs) == 1}, output


class LossSums:
    """Sums of both kinds of block loss over windows."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, y_hat: Tensor, y: Tensor) -> None:
        """Add a window: y_hat and y (1, T, d)."""
        for kind, error_sums in (("block", block_error_sums), ("token", token_error_sums)):
            sums = torch.stack(error_sums(y_hat, y)).double()
            self._sums[kind] = self._sums[kind] + sums if kind in self._sums else sums

    def losses(self) -> BlockLosses:
        """The two relative errors."""
        tiny = torch.finfo(torch.float32).tiny
        return BlockLosses(**{kind: finite(float(s[0] / s[1].clamp_min(tiny))) for kind, s in self._sums.items()})


def block_losses(reference: nn.Module, module: nn.Module, x: Tensor, x_tilde: Tensor, call: BlockCall) -> BlockLosses:
    """Both block losses of `module` on x~ against `reference` on x: what to note before a block is tuned.

    Args:
        reference: the full-precision block, on the device.
        module: the quantized block, there too; packed or in training.
        x: (n, T, d) windows of the full-precision stream, anywhere.
        x_tilde: (n, T, d) the same windows of the quantized stream.
        call: the block's other arguments.
    """
    device, sums = device_of(reference), LossSums()
    with exact(device):
        for w in range(len(x)):
            y = run_block(reference, x[w : w + 1].to(device), call)
            sums.add(run_block(module, x_tilde[w : w + 1].to(device), call), y)
    return sums.losses()


class LinearSums:
    """Sums of everything that is measured of one linear layer, over windows.

    Args:
        W: (N, K) full-precision weight.
    """

    def __init__(self, W: Tensor) -> None:
        self.W, self.windows, self.tokens = W, 0, 0
        self._sums = torch.zeros(8, dtype=torch.float64, device=W.device)

    def add(self, x: Tensor, x_tilde: Tensor, W_hat: Tensor, token_grams: bool = True) -> None:
        """Add a window: x and x_tilde (T, K), the quantized weight (N, K)."""
        true, pseudo, got = x.float() @ self.W.T, x_tilde.float() @ self.W.T, x_tilde.float() @ W_hat.T
        parts = []
        for target in (pseudo, true):
            cosines = nn.functional.cosine_similarity(got, target, dim=-1)
            grams = token_similarity_error(got, target) if token_grams else cosines.new_zeros(())
            squares = ((got - target).square().sum(), target.square().sum())
            parts += [t.double() for t in (*squares, cosines.sum(), grams)]
        self._sums += torch.stack(parts)
        self.windows, self.tokens = self.windows + 1, self.tokens + len(x)

    def measures(self, W_hat: Tensor) -> LinearMeasures:
        """The figures; `W_hat` (N, K) is the quantized weight."""
        sums = self._sums.tolist()
        difference, norm = (float(torch.linalg.vector_norm(t.double())) for t in (self.W - W_hat, self.W))
        values = {"weight_error": difference, "weight_error_relative": _ratio(difference, norm)}
        for name, (error, size, cosine, grams) in (("activation", sums[:4]), ("output", sums[4:])):
            values |= {
                f"{name}_error": error**0.5,
                f"{name}_error_relative": _ratio(error**0.5, size**0.5),
                f"{name}_similarity": _ratio(cosine, self.tokens),
                f"{name}_token_error": grams,
                f"{name}_token_error_mean": _ratio(grams, self.windows),
            }
        return LinearMeasures(**{name: finite(value) for name, value in values.items()})


def _ratio(a: float, b: float) -> float:
    """a / b; 0 / 0 counts as 0, as in the losses."""
    return a / b if b else (0.0 if a == 0 else float("inf"))


class RankSums:
    """Grams of outputs over windows, of the tokens as they are and of their directions."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._plain = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._directions = torch.zeros_like(self._plain)

    def add(self, y: Tensor) -> None:
        """Add a window (1, T, d)."""
        y = y[0].double()
        unit = nn.functional.normalize(y, dim=-1)
        self._plain += y.T @ y
        self._directions += unit.T @ unit

    def ranks(self) -> tuple[float | None, float | None]:
        """Effective rank of the outputs, and of their directions."""
        plain, directions = (
            finite(float(effective_rank(gram))) if bool(torch.isfinite(gram).all()) else None
            for gram in (self._plain, self._directions)
        )
        return plain, directions


def measure_block(
    reference: nn.Module,
    module: nn.Module,
    x: Tensor,
    x_tilde: Tensor,
    call: BlockCall,
    names: list[str],
    *,
    index: int = 0,
    before: BlockLosses | None = None,
    attention: bool = True,
) -> BlockMeasures:
    """Measure a quantized block against the full-precision one.

    Both blocks are left as they were. Besides the blocks, memory is taken for one window: the inputs of every linear
    layer, one T x T Gram at a time, the attention maps of both blocks, and four (d, d) Grams in float64.

    Args:
        reference: the full-precision block, on the device, in evaluation mode.
        module: the quantized block, there too, its linear layers packed.
        x: (n, T, d) windows of the full-precision stream, on any device.
        x_tilde: (n, T, d) the same windows of the quantized stream.
        call: the block's other arguments, on the blocks' device.
        names: linear layers to measure, by name inside the block.
        index: number of the block.
        before: losses before tuning, from `block_losses`.
        attention: compare attention maps.

    Returns:
        The record; its `probe` is None (lit_binq.diagnostics.probe fills it).

    Raises:
        ValueError: no windows, shapes that differ, or a layer that is not packed.
    """
    if x.shape != x_tilde.shape or x.dim() != 3 or not len(x):
        raise ValueError(f"diagnostics: got x {tuple(x.shape)} and x~ {tuple(x_tilde.shape)}, expected (n, T, d) alike")
    device, (n, T, d) = device_of(reference), x.shape
    losses, notes = LossSums(), []
    ranks, ranks_hat = RankSums(d, device), RankSums(d, device)
    divergence = torch.zeros((), dtype=torch.float64, device=device)
    with exact(device):
        linears = {name: LinearSums(dense_weight(reference.get_submodule(name))) for name in names}
        for name in names:
            dense_weight(module.get_submodule(name))  # refuse what is not packed before anything is computed
        for w in range(n):
            hidden, hidden_hat = (s[w : w + 1].to(device).float() for s in (x, x_tilde))
            inputs, y = linear_inputs(reference, names, hidden, call)
            inputs_hat, y_hat = linear_inputs(module, names, hidden_hat, call)
            losses.add(y_hat, y)
            ranks.add(y)
            ranks_hat.add(y_hat)
            for name in list(linears):
                if not _comparable(inputs.get(name), inputs_hat.get(name), T):
                    # Experts, say: which tokens reach them depends on the block's input.
                    notes.append(f"{name}: not measured, it does not see every token of a window once")
                    del linears[name]
                    continue
                W_hat = dense_weight(module.get_submodule(name))
                linears[name].add(inputs.pop(name), inputs_hat.pop(name), W_hat)
            if attention:
                try:
                    p = attention_maps(reference, hidden, call, y)
                    q = attention_maps(module, hidden_hat, call, y_hat)
                    divergence += _divergence(p, q)
                except NoAttentionMaps as error:
                    attention = False
                    notes.append(f"attention maps: not compared, {error}")
        measured = {name: s.measures(dense_weight(module.get_submodule(name))) for name, s in linears.items()}
        (plain, directions), (plain_hat, directions_hat) = ranks.ranks(), ranks_hat.ranks()
    for note in notes:
        log.info("block %d, %s", index, note)
    return BlockMeasures(
        block=index,
        windows=n,
        window_length=T,
        before=before,
        after=losses.losses(),
        ranks=EffectiveRanks(plain, plain_hat, directions, directions_hat),
        attention_divergence=finite(float(divergence) / n) if attention else None,
        linears=measured,
        notes=notes,
    )


def _comparable(a: Tensor | None, b: Tensor | None, T: int) -> bool:
    return a is not None and b is not None and len(a) == len(b) == T


def _divergence(p: dict[str, Tensor], q: dict[str, Tensor]) -> Tensor:
    """Mean divergence over the attention modules of a block, () float64."""
    if p.keys() != q.keys():
        raise NoAttentionMaps("the two blocks return attention maps of different modules")
    return torch.stack([attention_divergence(p[name], q[name]).double() for name in p]).mean()
