"""What a pass, a step and a fit hold is counted without being held, and agrees with what torch then takes."""

from collections.abc import Callable

import pytest
import torch
from conftest import VOCAB
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import architectures
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.preflight.block_memory import block_memory, head_step, solve_bytes
from lit_binq.calibration.preflight.checks import Report, require_resources
from lit_binq.calibration.preflight.durations import fit_seconds
from lit_binq.calibration.preflight.estimates import Estimate, Phase, Run, estimate, format_sizes, gigabytes, minutes
from lit_binq.calibration.preflight.live_bytes import LiveBytes, counting, pass_bytes, step_bytes
from lit_binq.calibration.streams import StreamOptions
from lit_binq.models.blocks import capture_calls, find_blocks
from lit_binq.solvers import PlanesSolver, RowColumnSolver, TwoPlaneSolver

CPU = torch.device("cpu")
MB = 2**20


def test_bytes_are_counted_while_tensors_live() -> None:
    live = LiveBytes()
    with live:
        a = torch.ones(MB)  # 4 MB
        b = a + 1
        assert live.now == 8 * MB
        view = b.reshape(2, -1)[1]
        del b
        assert live.now == 8 * MB  # the view holds it
        del view
        assert live.now == 4 * MB
        c = a.double()
        del c
    assert live.peak == 12 * MB
    assert live.now == 4 * MB


def test_a_step_of_a_product_is_what_arithmetic_says() -> None:
    """x (n, k) W (m, k) to the mean square: output and its square are made, W's gradient stays."""
    n, k, m = 64, 32, 16
    with counting():
        W, x = nn.Parameter(torch.empty(m, k)), torch.empty(n, k)
        kept, peak, left = step_bytes(lambda: (x @ W.T).square().mean(), None)
        assert left == 4 * m * k
        assert 4 * n * m <= kept <= 2 * 4 * n * m
        assert peak >= 2 * 4 * n * m
        assert pass_bytes(lambda: x @ W.T) == 4 * n * m


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", ["gemma3", "bloom", "mamba"])
def test_counted_bytes_are_those_of_a_real_step(kind: str) -> None:
    """The same step with real tensors, its storages followed by the test itself."""
    model = architectures.make(kind).requires_grad_(False)
    blocks = find_blocks(model)
    call = capture_calls(model, blocks, torch.randint(VOCAB - 4, (1, 64)))[0]
    counted = block_memory(blocks[0], call, (1, 64, 32), 4, 4, None, (True, True, True))
    real = Follow()
    from lit_binq.models.block_calls import run_block

    with torch.no_grad(), real:
        out = run_block(blocks[0], torch.randn(4, 64, 32), call)
        del out
    assert counted.forward == pytest.approx(real.peak - 4 * 4 * 64 * 32, rel=0.1)
    assert counted.dense == sum(t.numel() * t.element_size() for t in (*blocks[0].parameters(), *blocks[0].buffers()))
    assert counted.step.gradients >= 4 * counted.weights
    assert counted.step.peak > counted.step.kept > counted.forward / 4


class Follow(TorchDispatchMode):
    """The most bytes of distinct storages that are alive, looked up anew after every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.made: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        import weakref

        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.made.append(weakref.ref(t.untyped_storage()))  # type: ignore[arg-type]
        alive = {s.data_ptr(): s.nbytes() for r in self.made if (s := r()) is not None}  # type: ignore[operator]
        self.peak = max(self.peak, sum(alive.values()))
        return out


def test_logits_rule_the_heads_step(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    step = head_step(model, (4, 64), torch.bfloat16, True)
    logits = 4 * 64 * VOCAB * 2
    assert step.peak > 3 * logits  # the student's, the teacher's, their gradient
    assert step.gradients == 4 * VOCAB * 32  # tied: once


def run(**options: object) -> Run:
    settings: dict[str, object] = {
        "device": CPU, "windows": (20, 64), "batch": 4, "train": 16, "streams": StreamOptions(batch_windows=4),
        "closed_form": ClosedForm(), "tuning": BlockTuning(epochs=1), "end_to_end": ModelTuning(epochs=1),
        "evaluation": (4, 64),
    }  # fmt: skip
    return Run(**settings | options)  # type: ignore[arg-type]


@pytest.fixture
def counted(llama: PreTrainedModel) -> Callable[..., Estimate]:
    calls = capture_calls(llama, find_blocks(llama), torch.randint(VOCAB, (1, 64)))
    return lambda **options: estimate(llama, calls, run(**options), lambda: 10**6)


def phases(found: list[Phase]) -> dict[str, dict[str, float]]:
    return {p.name: p.parts for p in found}


def test_phases_hold_what_they_say(counted: Callable[..., Estimate]) -> None:
    e = counted()
    host, S = phases(e.host), 4 * 20 * 64 * 32
    weights, scales = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert host.keys() == {"closed form", "tuning", "model", "writing", "evaluation"}
    assert host["closed form"]["streams"] == host["tuning"]["streams"] == 3 * S
    assert "streams" not in host["model"]  # they are closed by then
    assert host["closed form"]["resident at the start"] == 10**6
    P = host["tuning"]["best epoch"]
    assert 4 * (weights + scales + 2 * 32) == P  # latents, scales and norms
    assert host["tuning"]["moments"] == 2 * P
    assert host["model"]["teacher's hidden states"] == S
    assert host["evaluation"]["logits"] >= 4 * 4 * 64 * VOCAB
    assert e.device == []
    assert e.streams == 0
    assert e.fit_peak(e.host) == max(Phase("", host[name]).total for name in ("closed form", "tuning", "model"))


def test_options_move_what_they_should(counted: Callable[..., Estimate]) -> None:
    base = phases(counted().host)
    disk = counted(streams=StreamOptions(cache="disk", batch_windows=4))
    assert disk.streams == 3 * 4 * 20 * 64 * 32
    assert "streams" not in phases(disk.host)["tuning"]
    assert phases(counted(end_to_end=ModelTuning(epochs=0)).host).keys() == base.keys() - {"model"}
    assert phases(counted(tuning=BlockTuning(epochs=0)).host).keys() == base.keys() - {"tuning"}
    larger = phases(counted(batch=8).host)
    assert larger["model"]["kept for the backward pass"] > 1.5 * base["model"]["kept for the backward pass"]
    weight = phases(counted(closed_form=ClosedForm(objective="weight")).host)
    assert Phase("", weight["closed form"]).total < Phase("", base["closed form"]).total
    half = phases(counted(autocast=torch.bfloat16).host)
    assert half["model"]["teacher's hidden states"] == base["model"]["teacher's hidden states"] / 2


def test_a_gpu_takes_the_blocks_and_what_fits(counted: Callable[..., Estimate]) -> None:
    cuda = torch.device("cuda")
    roomy, tight = counted(device=cuda, free=10**9), counted(device=cuda, free=10**5)
    assert "streams" in phases(roomy.device)["tuning"]
    assert "streams" not in phases(roomy.host)["tuning"]
    assert "streams" in phases(tight.host)["tuning"]
    assert "teacher's hidden states" in phases(tight.host)["model"]
    assert "full-precision block" in phases(roomy.device)["closed form"]
    # A batch that the graph was not made for needs room beside the graph's.
    odd, eager = (counted(device=cuda, free=10**9, train=15, graphs=graphs) for graphs in (True, False))
    assert odd.largest(odd.device).total > eager.largest(eager.device).total
    assert odd.fit_peak(odd.device) == eager.fit_peak(eager.device)


@pytest.mark.parametrize(
    ("solver", "latents", "bits"),
    [(RowColumnSolver(), 1.0, 1.3), (TwoPlaneSolver(group=64), 1.0, 2.7), (PlanesSolver(shares=[1.0, 1.0]), 1.0, 3.9)],
)
def test_latents_and_bits_of_a_format(solver: object, latents: float, bits: float) -> None:
    found = format_sizes(ClosedForm(solver=solver))  # type: ignore[arg-type]
    assert found[0] == pytest.approx(latents, rel=0.05)
    assert found[1] == pytest.approx(bits, rel=0.35)


def test_solving_grows_with_the_square_of_the_width() -> None:
    assert solve_bytes(64, 2048, True) == pytest.approx(4 * solve_bytes(64, 1024, True), rel=0.1)
    assert solve_bytes(64, 1024, False) < solve_bytes(64, 1024, True)


def test_more_epochs_take_longer(llama: PreTrainedModel) -> None:
    few, many = (fit_seconds(llama, run(tuning=BlockTuning(epochs=e))) for e in (1, 10_000))
    assert 0 < few < many


def report(host: float) -> Report:
    parts = Estimate([Phase("model", {"logits": host})], [], 0, 0, 0)
    return Report(parts, 10**9, 0, [], 60.0, 1.0)


def test_only_what_clearly_exceeds_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    from lit_binq.errors import LitBinqError

    require_resources(report(0.9e9), run(), refuse=True)
    assert caplog.text == ""
    require_resources(report(1.2e9), run(), refuse=True)
    assert "about 1.20 GB needed, 1.00 GB there" in caplog.text
    with pytest.raises(LitBinqError, match=r"model\.preflight\.check_resources: false") as caught:
        require_resources(report(1.3e9), run(), refuse=True)
    assert "data.batch_size" in str(caught.value)
    assert "\n" not in str(caught.value)
    require_resources(report(1.3e9), run(), refuse=False)


def test_words() -> None:
    assert [gigabytes(s) for s in (1e6, 1.234e9, 12.34e9, 123.4e9)] == ["0.00", "1.23", "12.3", "123"]
    assert [minutes(s) for s in (3, 61, 600, 7200)] == ["10 s", "70 s", "10 min", "2.0 h"]
    line = report(1e9).line()
    assert "host memory 1.00 of 1.00 GB (model)" in line
    assert "model" in report(1e9).table()
