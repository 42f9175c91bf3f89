"""A loss as CUDA graphs: the ordinary way on the CPU; on a GPU the same losses and gradients, step by step."""

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_model
from torch import Tensor, nn

from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.cuda_graphs import GraphedLoss
from lit_binq.calibration.model_stage import ModelStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.stage import Stage
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TRAIN, HELD_OUT = 8, 2


class Squares(nn.Module):
    """x (b, k), y (b,) to the mean of (x w - y)^2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(3.0))
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return (x @ self.w - y).square().mean()


def inputs(b: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, 3, generator=g), torch.randn(b, generator=g)


def test_what_a_capture_ties_into_a_cycle_is_gone_after_release() -> None:
    """As torch's graphed callables do: the module holds a function that holds the module."""
    module = Squares()
    loss = GraphedLoss(module)
    step = nn.Module()
    step.held, step.itself = torch.ones(3), (lambda kept: lambda: kept)(step)
    loss._graphed, held = step, weakref.ref(step.held)
    del step
    gc.disable()
    try:
        loss.release()
        assert held() is None
    finally:
        gc.enable()


@gpu
@needs_gpu
def test_stages_leave_no_graph_behind() -> None:
    """Memory held after each of several blocks does not grow."""
    held = []
    for seed in range(4):
        module = Squares().cuda()
        loss = GraphedLoss(module)
        x, y = (t.cuda() for t in inputs(4, seed))
        loss(x, y).backward()
        loss.release()
        del module, loss
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[0]


@pytest.mark.parametrize("enabled", [True, False])
def test_on_the_cpu_every_call_runs_the_module(enabled: bool) -> None:
    """Whatever the shape; losses are separate tensors that belong to their own inputs."""
    module = Squares()
    loss = GraphedLoss(module, enabled)
    batches = [inputs(4), inputs(4, 1), inputs(2, 2), inputs(4, 3)]
    losses = [loss(*batch) for batch in batches]
    assert module.calls == 4
    for value, (x, y) in zip(losses, batches, strict=True):
        assert float(value.detach()) == pytest.approx(float((x @ module.w.detach() - y).square().mean()), rel=1e-6)
        module.w.grad = None
        value.backward()
        assert module.w.grad is not None
        torch.testing.assert_close(module.w.grad, 2 * x.T @ (x @ module.w.detach() - y) / len(y))
    with torch.no_grad():
        assert not loss(*batches[0]).requires_grad


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "operation not permitted when"),
        (torch.OutOfMemoryError("tried to allocate 2.32 GiB\nmore"), "tried to allocate 2.32 GiB; lower `data.batch_"),
    ],
)
def test_the_first_error_of_a_capture_is_named(first, words, monkeypatch, caplog) -> None:
    """Leaving a capture that failed raises another error, and it is this one that Python reports."""

    def capture(*_: Any, **__: Any) -> None:
        try:
            raise first
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    GraphedLoss(Squares())._capture(inputs(4))
    assert f"no CUDA graph ({words}" in caplog.text
    assert "previous error" not in caplog.text


def test_errors_of_the_module_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        GraphedLoss(Squares())(torch.ones(2, 4), torch.ones(2))


class Memory(nn.Module):
    """What replays share: a loss, and a gradient that even the next forward pass writes over."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.loss, self.gradient = module, torch.zeros(()), torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        return Replay.apply(self.module.w, x.as_subclass(Tensor), self)


class Replay(torch.autograd.Function):
    """(w * x).sum() through the memory of all replays."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, memory: Memory) -> Tensor:
        ctx.x, ctx.memory = x, memory
        memory.gradient.fill_(-7)  # a buffer of the forward pass lies where gradients will
        memory.loss.copy_((w * x).sum())
        return memory.loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.memory.gradient.copy_(grads[0] * ctx.x)
        return ctx.memory.gradient.detach(), None, None


class SaysCuda(Tensor):
    """A tensor of the host that claims to be on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute there
        return torch.device("cuda")


def claimed(b: int, seed: int = 0) -> list[Tensor]:
    return [t.as_subclass(SaysCuda) for t in inputs(b, seed)]


def test_replays_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read, and gradients of several batches summed, as if each had its own memory."""
    module = Squares()
    module.w = nn.Parameter(torch.ones(3))
    replays = Memory(module)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: replays)
    loss = GraphedLoss(module)
    losses = []
    for _ in range(2):  # steps of two batches each
        module.w.grad = None
        for x in (torch.arange(3.0), torch.full((3,), 10.0)):
            losses.append(loss(x.as_subclass(SaysCuda)))
            losses[-1].backward()
        assert module.w.grad is not None
        assert module.w.grad.tolist() == [10, 11, 12]
    assert [float(t.detach()) for t in losses] == [3, 30, 3, 30]


def test_only_the_first_shape_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once, at the first call with gradient; the last, smaller batch takes the ordinary way."""
    captured: list[tuple[int, ...]] = []

    class Captured(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.replays = module, 0

        def forward(self, *args: Tensor) -> Tensor:
            self.replays += 1
            return self.module(*args)

    def make(module: nn.Module, sample: tuple[Tensor, ...], **options: Any) -> nn.Module:
        captured.append(tuple(sample[0].shape))
        made.append(Captured(module))
        return made[-1]

    made: list[Captured] = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    loss = GraphedLoss(Squares())
    with torch.no_grad():
        loss(*claimed(2))
    assert captured == []
    for batch in (claimed(4), claimed(4, 1), claimed(2), claimed(4, 2)):
        loss(*batch).backward()
    assert captured == [(4, 3)]
    assert made[0].replays == 3
    GraphedLoss(Squares(), enabled=False)(*claimed(4))
    assert len(captured) == 1


def test_a_failed_capture_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def make(*args: Any, **options: Any) -> nn.Module:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    module = Squares()
    loss = GraphedLoss(module)
    for seed in range(3):
        loss(*claimed(4, seed)).backward()
    assert module.calls == 3
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graph (operation not permitted): steps are launched one by one"
    ]


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def stage_on_gpu(kind: str, graphs: bool, architecture: str) -> Stage:
    """The first block's stage, or the model stage, of a tiny model, ready to be tuned."""
    windows = torch.randint(VOCAB, (TRAIN + HELD_OUT, 16), generator=torch.Generator().manual_seed(0))
    device = torch.device("cuda")
    work = Workspace(
        tiny_model(architecture, blocks=1), windows, HELD_OUT, device, StreamOptions(), torch.float16, graphs
    )
    stage: Stage = BlockStage(work, 0, ClosedForm(), BlockTuning(epochs=1, lr_codes=0.01))
    stage.enter()
    if kind == "model":
        stage.leave()
        stage = ModelStage(
            work, ModelTuning(epochs=1, lr_codes=0.01, lr_scales=3e-3, lr_norms=1e-3, lr_embeddings=1e-3)
        )
        stage.enter()
    return stage


def trained(
    stage: Stage, batches: list[list[int]], accumulate: int, precision: str
) -> tuple[list[float], list[Tensor]]:
    """Losses of all steps, and the parameters at the end; gradients of `accumulate` batches are summed."""
    # Plain gradient steps: Adam would turn a gradient of rounding noise into a whole step.
    parameters = [p for group in stage.parameter_groups() for p in group["params"]]
    optimizer, losses, gradients = torch.optim.SGD(parameters, lr=1e-3), [], []
    for i, rows in enumerate(batches):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = stage.loss(torch.tensor(rows))
        losses.append(loss)
        loss.backward()
        if (i + 1) % accumulate == 0:
            gradients = [p.grad.clone() for p in parameters if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    return [float(t.detach()) for t in losses], gradients + [p.detach().clone() for p in parameters]


BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7], [5, 3, 1], [7, 6, 0], [4, 2], [1, 2, 3], [4, 5, 6]]
"""Two epochs whose last batch is smaller, and a third."""


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["block", "model"])
def test_graphs_take_the_same_steps(kind: str, architecture: str, accumulate: int, precision: str) -> None:
    """Losses of every step are read after the last one: a replay must not write over an earlier loss."""
    results = []
    for graphs in (False, True):
        stage = stage_on_gpu(kind, graphs, architecture)
        with warnings.catch_warnings():
            # The capture runs backward on a side stream, the smaller batches on the ordinary one.
            warnings.filterwarnings("ignore", message=".*AccumulateGrad.*stream.*")
            results.append(trained(stage, BATCHES, accumulate, precision))
        assert (stage._loss._graphed is not None) == graphs  # type: ignore[attr-defined]  # both stages have one
        assert len(set(results[-1][0])) == len(BATCHES)
    tolerance = 1e-4 if precision == "32-true" else 3e-2
    assert results[1][0] == pytest.approx(results[0][0], rel=tolerance)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(float(a.abs().max()), 1e-6))


@gpu
@needs_gpu
def test_a_capture_leaves_parameters_and_gradients_alone() -> None:
    module = Squares().cuda()
    before = copy.deepcopy(module.state_dict())
    loss = GraphedLoss(module)
    batch = tuple(t.cuda() for t in inputs(4))
    first, second = loss(*batch), loss(*(t.cuda() for t in inputs(4, 1)))
    assert module.w.grad is None
    assert torch.equal(module.w, before["w"])
    assert first.data_ptr() != second.data_ptr()
    assert float(first.detach()) != float(second.detach())
    module.calls = 0
    loss(*(t.cuda() for t in inputs(4, 2)))
    assert module.calls == 0  # a replay


class Synchronises(Squares):
    """Asks the device for a number, which a graph cannot hold."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * (1.0 if float(x.sum()) > -1e9 else 2.0)


@gpu
@needs_gpu
def test_what_cannot_be_captured_runs_the_ordinary_way(caplog: pytest.LogCaptureFixture) -> None:
    loss, plain = GraphedLoss(Synchronises().cuda()), Squares().cuda()
    for seed in range(3):
        batch = tuple(t.cuda() for t in inputs(4, seed))
        assert float(loss(*batch).detach()) == pytest.approx(float(plain(*batch).detach()))
    assert caplog.text.count("no CUDA graph") == 1
