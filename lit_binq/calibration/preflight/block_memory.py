"""What one block, and what lies behind the last one, hold in memory while they run, train and are solved.

Legend: b windows, T tokens a window, d hidden size, V vocabulary; a linear layer has N rows and K columns.

Passes and training steps are counted on tensors without content (lit_binq.calibration.preflight.live_bytes), so they
follow from the model's own code. A block whose code asks for values, as experts do, is run on a few tokens instead, and
what depends on tokens grows with their number. What is solved in closed form is counted by hand: `solve_bytes`.
"""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.calibration.kl import kl_divergence
from lit_binq.calibration.preflight.live_bytes import (
    copy_without_content,
    counting,
    pass_bytes,
    step_bytes,
    without_content,
)
from lit_binq.formats.row_column import LatentBinaryLinear, RowColumn
from lit_binq.models.block_calls import BlockCall, hooked, run_block
from lit_binq.models.blocks import find_layers, norm_parameters, replace_module

FEW = 16
"""Tokens of the shorter of two real passes, where tensors without content do not do."""


@dataclass
class Step:
    """Bytes of a training step: `kept` for the backward pass, `peak` at once, `gradients` left afterwards."""

    kept: int
    peak: int
    gradients: int

    @property
    def transient(self) -> int:
        """What the backward pass holds at most beside what was kept."""
        return max(self.peak - self.kept, 0)


@dataclass
class BlockMemory:
    """A block's needs.

    Attributes:
        dense: bytes of its float32 tensors.
        linears: (N, K) of its linear layers, but for those that are never called.
        forward: the most a pass of statistics holds (float32, no gradient), its output among it.
        step: a training step of one latent a weight.
    """

    dense: int
    linears: list[tuple[int, int]]
    forward: int
    step: Step

    @property
    def weights(self) -> int:
        """Weights of all linear layers."""
        return sum(N * K for N, K in self.linears)


def size_of(module: nn.Module) -> int:
    """Bytes of a module's tensors, a shared one once."""
    tensors = {t.data_ptr() or id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def block_memory(
    block: nn.Module,
    call: BlockCall,
    hidden: tuple[int, int, int],
    batch_windows: int,
    batch: int,
    autocast: torch.dtype | None,
    train: tuple[bool, bool, bool],
) -> BlockMemory:
    """Count a block.

    Args:
        block: full precision.
        call: its other arguments, for T tokens.
        hidden: (1, T, d).
        batch_windows: windows of a pass of statistics.
        batch: windows of a training step.
        autocast: the step's mixed precision; None is float32.
        train: whether codes, scales and norms are trained.
    """
    _, T, d = hidden
    called: dict[str, tuple[int, int]] = {}

    def forward(module: nn.Module, call: BlockCall, x: Tensor) -> int:
        with ExitStack() as stack:
            for name, m in find_layers(module, nn.Linear).items():
                note = partial(lambda name, m, *_: called.update({name: (m.out_features, m.in_features)}), name)
                stack.enter_context(hooked(m.register_forward_pre_hook(note)))
            return pass_bytes(lambda: run_block(module, x, call))

    def step(module: nn.Module, call: BlockCall, x: Tensor) -> Step:
        def loss() -> Tensor:
            return (run_block(module, x, call).float() - 0.5).square().mean()

        return Step(*step_bytes(loss, autocast))

    try:
        with counting():
            empty, arguments = copy_without_content(block), call.map(without_content)
            passed = forward(empty, arguments, torch.empty(batch_windows, T, d))
            _make_latent(empty, called, train)
            trained = step(empty, arguments, torch.empty(batch, T, d))
    except Exception:  # what a block's code asks of values that are not there is its own
        few, more = (_shorter(call, T, n) for n in (FEW, 2 * FEW))
        copied = copy.deepcopy(block)
        ends = [forward(copied, c, torch.randn(1, n, d)) for c, n in ((few, FEW), (more, 2 * FEW))]
        passed = _extended(ends[0], ends[1], batch_windows * T)
        _make_latent(copied, called, train)
        first, second = (step(copied, c, torch.randn(1, n, d)) for c, n in ((few, FEW), (more, 2 * FEW)))
        kept, peak = (_extended(a, b, batch * T) for a, b in ((first.kept, second.kept), (first.peak, second.peak)))
        trained = Step(kept, peak, second.gradients)
    return BlockMemory(size_of(block), list(called.values()), passed, trained)


def head_step(
    model: PreTrainedModel, windows: tuple[int, int], autocast: torch.dtype | None, train_matrices: bool
) -> Step:
    """Bytes of the model stage's step outside the blocks: embeddings, head and divergence.

    Args:
        model: full precision.
        windows: (b, T) of a step.
        autocast: its mixed precision.
        train_matrices: whether embeddings and head are trained.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    b, T = windows
    with counting():
        embedding, out = (copy_without_content(m) for m in (table, head))
        if getattr(head, "weight", 0) is getattr(table, "weight", 1):
            out.weight = embedding.weight
        for m in (embedding, out):
            m.requires_grad_(train_matrices)
        tokens = torch.zeros(b, T, dtype=torch.int64)

        def loss() -> Tensor:
            hidden = embedding(tokens)
            if not hidden.requires_grad:
                hidden.requires_grad_(True)
            logits = out(hidden.float())
            return kl_divergence(logits, torch.empty_like(logits))

        return Step(*step_bytes(loss, autocast))


def solve_bytes(N: int, K: int, statistics: bool) -> int:
    """Bytes of the closed form of an N x K layer beside the activations.

        statistics        S, C, F                       3 x 4 K^2   (twice while they are divided by the tokens)
        target            H, and in float64 the damped Gram, its factor and C: 4 K^2 + 24 K^2;
                          W, the right side and the solution in float64: 24 N K;  T: 4 N K
        solve             T, T H, codes: 12 N K;  panels of the descent: 5 x 4 N K
          or its column scales in float64: H, B^T B, A, A + ridge, factor: 40 K^2;  B diag(r) and its product: 16 N K

    Args:
        N: rows.
        K: columns.
        statistics: False for the objective `weight`, which takes none and has H = I.
    """
    grams = 12 * K * K if statistics else 0
    gathered = 2 * grams
    target = grams + 28 * K * K + 28 * N * K if statistics else 4 * K * K + 4 * N * K
    solve = grams + 4 * K * K + 12 * N * K + max(20 * N * K, 40 * K * K + 16 * N * K)
    return max(gathered, target, solve)


def _make_latent(block: nn.Module, names: Iterable[str], train: tuple[bool, bool, bool]) -> None:
    """Put the trainable layer of the row x column format in place of linear layers."""
    codes, scales, norms = train
    for name in names:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        W = linear.weight
        solution = RowColumn(torch.ones_like(W[:, 0]), torch.ones_like(W[0]), torch.ones_like(W))
        replace_module(block, name, LatentBinaryLinear(solution, linear.bias, codes))
    block.requires_grad_(False)
    for layer in find_layers(block, LatentBinaryLinear).values():
        for p in (*layer.code_parameters(), *(layer.scale_parameters() if scales else ())):
            p.requires_grad_(True)
    for p in norm_parameters(block).values():
        p.requires_grad_(norms)


def _shorter(call: BlockCall, T: int, tokens: int) -> BlockCall:
    """The call for fewer tokens: every dimension of T entries is cut."""
    return call.map(lambda t: t[tuple(slice(tokens) if size == T else slice(None) for size in t.shape)])


def _extended(few: int, more: int, tokens: int) -> int:
    """Bytes for `tokens` tokens, from those for FEW and twice as many."""
    return more + max(more - few, 0) * (tokens - 2 * FEW) // FEW
