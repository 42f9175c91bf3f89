"""What a fit will take: memory of host and device by phase, disk, and time.

Legend: n windows of T tokens on this rank, d hidden size, V vocabulary; b windows a step (`data.batch_size`), w windows
a pass (`streams.batch_windows`); S = 4 n T d bytes, one stream; W weights of a block's linear layers, R latents a
weight of the format; P bytes of what a stage trains (float32).

Phases, one after the other, and what each holds:

    closed form    streams 3 S; full-precision block and its copy; the larger of a pass with Grams and a solve; P, its
                   gradients and 2 P moments of the block before, which the optimizer holds until it has the next
    tuning         streams 3 S; full-precision block; P latents and scales, 2 P moments; a step, gradients among it,
                   or a pass that scores the epoch
    model          student's embeddings, head and norms; P latents and scales, 2 P moments, P gradients;
                   the teacher's last hidden states n T d and its head, or all of the teacher; a step: what every block
                   keeps for its backward pass, logits of student and teacher b T V, their gradient and float32 parts
    writing        what is written, twice: as it is stored and as bytes; the folder read again
    evaluation     packed model and its source; logits of a batch, b T V in float32

The host holds besides: what is resident when the estimate is made (libraries, texts, teacher), the student's
embeddings, head and norms, packed blocks (in the model stage a copy of what is finished too), the best epoch's P,
CUDA's libraries, and streams or hidden states that the device has no room for. On a CPU both are one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.calibration.block_stage import TEACHER_BYTES
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.preflight.block_memory import BlockMemory, Step, block_memory, head_step, size_of, solve_bytes
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.teacher_cache import DEVICE_SHARE
from lit_binq.errors import LitBinqError
from lit_binq.formats import Solution
from lit_binq.models.block_calls import BlockCall, kind_of
from lit_binq.models.blocks import find_blocks
from lit_binq.solvers import Problem

LATENT_STEP = 14
"""Bytes a step holds for each latent beyond one a weight: sign, its product with a scale, the weight in two dtypes."""

UNPACK = 4.5
"""Bytes a packed layer makes for each weight while it multiplies: an int32 index for eight signs, a float32 a sign."""

CUDA_HOST = 1.3e9
"""Bytes that a process holds for CUDA's context and libraries: what two fits on an H200 held beside all other parts."""

SAMPLE = 64, 256
"""Shape of the weight that shows how many latents and bits a format takes."""


@dataclass
class Run:
    """The sizes of a fit.

    Attributes:
        device: where blocks run.
        windows: (n, T) of this rank, held-out ones among them.
        batch: b, windows of a step.
        train: windows that are trained on.
        streams: where activations are cached.
        closed_form: how layers are solved.
        tuning: of each block.
        end_to_end: of the whole model.
        autocast: mixed precision of steps; None is float32.
        ranks: processes.
        unquantized_bytes: of a value outside the packed weights, on disk.
        evaluation: (b, T) of an evaluation batch; None if nothing is evaluated afterwards.
        compare_fp: whether the source is evaluated too.
        free: bytes free on a CUDA device.
        graphs: whether steps may be captured as CUDA graphs.
        cached: whether the model's logits are its head's output, so that the model stage keeps hidden states only.
    """

    device: torch.device
    windows: tuple[int, int]
    batch: int
    train: int
    streams: StreamOptions
    closed_form: ClosedForm
    tuning: BlockTuning
    end_to_end: ModelTuning
    autocast: torch.dtype | None = None
    ranks: int = 1
    unquantized_bytes: int = 2
    evaluation: tuple[int, int] | None = None
    compare_fp: bool = True
    free: int = 0
    graphs: bool = True
    cached: bool = True


@dataclass
class Phase:
    """A part of the fit and what it holds, by name, in bytes."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All parts together."""
        return round(sum(self.parts.values()))


@dataclass
class Estimate:
    """Memory by phase, and what is written, in bytes.

    Attributes:
        host: phases; the fit's are those before `writing`.
        device: phases on a CUDA device, empty on a CPU.
        packed: the packed folder without its tokenizer.
        checkpoint: one checkpoint.
        streams: files of `streams.cache: disk`.
    """

    host: list[Phase]
    device: list[Phase]
    packed: int
    checkpoint: int
    streams: int

    @staticmethod
    def largest(phases: list[Phase]) -> Phase:
        """The phase that holds most."""
        return max(phases, key=lambda p: p.total)

    def fit_peak(self, phases: list[Phase]) -> int:
        """The most that the fit's tensors hold, before it writes."""
        return max((p.total - round(p.parts.get(TAIL, 0)) for p in phases if p.name not in AFTER), default=0)


AFTER = ("writing", "evaluation")

BEST = "best epoch"

TAIL = "last, smaller batch beside the CUDA graph"
"""The graph's pool is torch's for good, but no tensor's while another batch runs: needed, but not held by tensors."""


@dataclass
class _Sizes:
    """What the formulas know of the model, in bytes where nothing else is said."""

    S: int
    d: int
    rest: int
    matrices: int
    vocabulary: int
    kinds: list[tuple[int, BlockMemory]]
    head: Step
    latents: float
    bits: float
    teacher: int
    cached_head: bool

    def packed(self, unquantized_bytes: int) -> int:
        """All block linears as they are stored, and the blocks' other tensors."""
        weights = sum(count * m.weights for count, m in self.kinds)
        other = sum(count * (m.dense // 4 - m.weights) for count, m in self.kinds)
        return round(weights * self.bits / 8 + other * unquantized_bytes)


def estimate(
    model: PreTrainedModel, calls: list[BlockCall], run: Run, resident: Callable[[], int], loading: int = 0
) -> Estimate:
    """What a fit will take.

    Args:
        model: the full-precision model, on the host.
        calls: its blocks' arguments.
        run: sizes and options.
        resident: gives the bytes of this process, the model among them; asked once the blocks are counted.
        loading: bytes that loading the model took for a while beside the model.
    """
    sizes = _sizes(model, calls, run)
    held = resident()
    cuda = run.device.type == "cuda"
    on_device = cuda and _streams_on_device(run, 3 * sizes.S)
    rest = sizes.rest * 4
    stays = {"resident at the start": float(held), "student's embeddings, head, norms": float(rest)}
    stays |= {"CUDA's libraries": CUDA_HOST} if cuda else {}
    streams = {"streams": 3.0 * sizes.S} if run.streams.cache != "disk" else {}
    packed = {"packed blocks": float(sizes.packed(4))}
    block_phases = _block_phases(sizes, run, cuda)
    device, host = [], []
    for phase in block_phases:
        if cuda:
            parts, kept = _apart(phase.parts)
            device.append(Phase(phase.name, {**(streams if on_device else {}), **parts}))
            host.append(Phase(phase.name, {**stays, **({} if on_device else streams), **packed, **kept}))
        else:
            host.append(Phase(phase.name, {**stays, **streams, **packed, **phase.parts}))
    if run.end_to_end.epochs:
        parts, cache = _model_parts(sizes, run, cuda)
        where = bool(cuda and cache * DEVICE_SHARE <= run.free)
        cached = {"teacher's hidden states": float(cache)} if sizes.cached_head else {}
        tuned_rest = sizes.matrices * 4 if run.end_to_end.lr_embeddings else 0
        stays_too = {"what was finished, for a checkpoint": float(sizes.packed(4) + tuned_rest)}
        if cuda:
            parts, kept = _apart(parts)
            device.append(Phase("model", {**parts, **(cached if where else {})}))
            host.append(Phase("model", {**stays, **stays_too, **kept, **({} if where else cached)}))
        else:
            host.append(Phase("model", {**stays, **stays_too, **parts, **cached}))
    stored = sizes.packed(run.unquantized_bytes) + sizes.rest * run.unquantized_bytes
    again = float(rest + sizes.packed(4))
    host.append(
        Phase("writing", {**stays, **packed, "stored tensors and their bytes": 2.0 * stored, "read again": again})
    )
    teacher = float(size_of(model))
    if run.evaluation is not None:
        base = {"resident without the model": float(max(held - teacher, 0)), "packed model": again}
        models = {"full-precision model": teacher if run.compare_fp else 0.0}
        work = _evaluation_parts(sizes, run)
        if cuda:
            host.append(Phase("evaluation", {**base, **models, "loading it": float(loading)}))
            device.append(Phase("evaluation", {"packed model": again, **models, **work}))
        else:
            host.append(Phase("evaluation", {**base, **models, **_larger({"loading it": float(loading)}, work)}))
    matrices = sizes.matrices * 4 if run.end_to_end.lr_embeddings else 0
    on_disk = 3 * sizes.S if run.streams.cache == "disk" else 0
    return Estimate(host, device, stored, sizes.packed(4) + matrices, on_disk)


def _apart(parts: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """A stage's parts on the device, and on the host: the best epoch is kept there."""
    return {k: v for k, v in parts.items() if k != BEST}, {k: v for k, v in parts.items() if k == BEST}


def _larger(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return a if sum(a.values()) > sum(b.values()) else b


def _streams_on_device(run: Run, size: int) -> bool:
    return run.streams.cache == "device" or (run.streams.cache == "auto" and size < run.free / 3)


def _sizes(model: PreTrainedModel, calls: list[BlockCall], run: Run) -> _Sizes:
    blocks = find_blocks(model)
    n, T = run.windows
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    d = _width(blocks[0], calls[0])
    trained = (run.tuning.lr_codes > 0, run.tuning.lr_scales > 0, run.tuning.lr_norms > 0)
    counted: dict[object, list[int]] = {}
    for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        counted.setdefault(kind_of(block, call), []).append(i)
    kinds = []
    for places in counted.values():
        block, call = blocks[places[0]], calls[places[0]]
        shape = (1, T, d)
        memory = block_memory(block, call, shape, run.streams.batch_windows, run.batch, run.autocast, trained)
        kinds.append((len(places), memory))
    inside = {id(t) for t in (*blocks.parameters(), *blocks.buffers())}
    non_block = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    latents, bits = format_sizes(run.closed_form)
    step, V = Step(0, 0, 0), 0
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor):
        V = int(weight.shape[0])
        if run.end_to_end.epochs and isinstance(table, nn.Module):
            step = head_step(model, (run.batch, T), run.autocast, run.end_to_end.lr_embeddings > 0)
    cached = bool(run.end_to_end.epochs) and run.cached
    matrices = sum(t.numel() for t in non_block if isinstance(t, nn.Parameter) and t.dim() == 2)
    return _Sizes(
        S=4 * n * T * d,
        d=d,
        rest=sum(t.numel() for t in non_block),
        matrices=matrices,
        vocabulary=V,
        kinds=kinds,
        head=step,
        latents=latents,
        bits=bits,
        teacher=size_of(head) if cached and isinstance(head, nn.Module) else size_of(model),
        cached_head=cached,
    )


def _width(block: nn.Module, call: BlockCall) -> int:
    """d: the columns of the first linear layer."""
    return next(m.in_features for m in block.modules() if isinstance(m, nn.Linear))


def format_sizes(form: ClosedForm) -> tuple[float, float]:
    """Latents, and bits in a file, a weight of what the solver makes, by a small weight; one each if it cannot."""
    T = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    try:
        solution: Solution = form.solver.solve(Problem(T, torch.eye(SAMPLE[1]), form.bits or None))
        packed = solution.pack()
        latents = sum(p.numel() for p in packed.latent(True).code_parameters()) if packed.deployable else 0
    except (LitBinqError, ValueError, RuntimeError):
        return 1.0, max(form.bits, 1.0)
    bits = 8 * sum(t.nbytes for t in packed.weight_buffers().values())
    return max(latents / T.numel(), 1.0), bits / T.numel()


def _block_phases(sizes: _Sizes, run: Run, cuda: bool) -> list[Phase]:
    """Closed form and tuning of the kind of block that takes most, without streams."""
    T, w, b = run.windows[1], run.streams.batch_windows, run.batch
    w = min(w, run.windows[0])
    statistics = run.closed_form.objective != "weight"
    closed, tuned = [], []
    for _, m in sizes.kinds:
        widest = max((K for _, K in m.linears), default=0)
        inputs = 4 * w * T * widest
        hidden = 2 * 4 * w * T * sizes.d
        grams = 12 * widest * widest if statistics else 0
        # A pass with the other stream's inputs beside it; then both weighed token by token.
        gathering = max(m.forward + inputs, 4 * inputs) if statistics else m.forward
        solving = max((solve_bytes(N, K, statistics) for N, K in m.linears), default=0)
        kept = 4 * sum(K for _, K in m.linears) * run.train * T if statistics else 0  # at most: groups share inputs
        reference = {"full-precision block": float(m.dense)} if cuda else {}
        more = sizes.latents - 1
        P = m.step.gradients + 4 * more * m.weights if run.tuning.lr_codes else m.step.gradients
        before = {"optimizer of the block before": 4.0 * P} if run.tuning.epochs else {}
        closed.append(
            Phase(
                "closed form",
                {
                    **reference,
                    "block in progress": float(m.dense),
                    **before,
                    **({"teacher's inputs": float(min(kept, TEACHER_BYTES))} if kept else {}),
                    **_larger(
                        {"pass of statistics": float(gathering + hidden), "Gram matrices": float(grams)},
                        {"solving": float(solving)},
                    ),
                },
            )
        )
        if not run.tuning.epochs:
            continue
        frozen = 0 if run.tuning.lr_codes else 4 * sizes.latents * m.weights
        step = m.step.peak + more * LATENT_STEP * m.weights + 2 * 4 * b * T * sizes.d * (1 + bool(cuda))
        largest = max((N * K for N, K in m.linears), default=0)
        scoring = P + m.forward + hidden + 4 * largest
        tuned.append(
            Phase(
                "tuning",
                {
                    **reference,
                    "latents and scales": P + frozen,
                    BEST: float(P),
                    "moments": 2.0 * P,
                    **_larger({"step with gradients": float(step)}, {"gradients, pass that scores": float(scoring)}),
                    **({"buckets of DDP": float(P)} if run.ranks > 1 else {}),
                },
            )
        )
    phases = [max(closed, key=lambda p: p.total)]
    return phases + ([max(tuned, key=lambda p: p.total)] if tuned else [])


def _model_parts(sizes: _Sizes, run: Run, cuda: bool) -> tuple[dict[str, float], int]:
    """Parts of the model stage, and bytes of the teacher's last hidden states."""
    t, (n, T), b = run.end_to_end, run.windows, run.batch
    weights = sum(count * m.weights for count, m in sizes.kinds)
    trained = sum(count * m.step.gradients for count, m in sizes.kinds)
    if not run.tuning.lr_codes:
        trained += 4 * weights
    if not t.lr_codes:
        trained -= 4 * weights
    trained += round((sizes.latents - 1) * 4 * weights) if t.lr_codes else 0
    P = trained + (4 * sizes.matrices if t.lr_embeddings else 0)
    frozen = (0 if t.lr_codes else 4 * sizes.latents * weights) + (0 if t.lr_embeddings else 4 * sizes.rest)
    kept = sum(count * m.step.kept for count, m in sizes.kinds)
    kept += round((sizes.latents - 1) * 10 * weights) if t.lr_codes else 0
    last = max(m.step.transient for _, m in sizes.kinds)
    value = run.autocast.itemsize if run.autocast is not None else 4
    tail = run.train % b if cuda and run.graphs else 0
    parts = {
        "latents, scales, embeddings": float(P + frozen),
        BEST: float(P),
        "moments": 2.0 * P,
        "gradients": float(P),
        "kept for the backward pass": float(kept),
        "logits, their gradient, head": float(max(sizes.head.peak, last)),
        **({"teacher": float(sizes.teacher)} if cuda else {}),
        TAIL: kept * tail / b,
        **({"buckets of DDP": float(P)} if run.ranks > 1 else {}),
    }
    return {name: size for name, size in parts.items() if size}, n * T * sizes.d * value


def _evaluation_parts(sizes: _Sizes, run: Run) -> dict[str, float]:
    """Logits of an evaluation batch and the pass that makes them, in float32."""
    assert run.evaluation is not None
    b, T = run.evaluation
    share = b * T / (min(run.streams.batch_windows, run.windows[0]) * run.windows[1])
    logits = 4 * b * T * sizes.vocabulary
    widened = 2 * 4 * b * min(T, 128) * sizes.vocabulary
    passed = max(m.forward for _, m in sizes.kinds) * share
    return {"logits": float(logits + widened), "pass": passed}


def gigabytes(size: float) -> str:
    """Bytes in GB (10^9) with three digits at most."""
    value = size / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def minutes(seconds: float) -> str:
    """A rounded time in words."""
    if seconds < 90:
        return f"{max(math.ceil(seconds / 10) * 10, 10)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def known(value: Any) -> str:
    """A number of bytes in words; a dash where it is not known."""
    return "-" if value is None else f"{gigabytes(value)} GB"
