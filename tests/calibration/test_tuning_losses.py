"""What a block's tuning minimises: by hand and in a stage."""

import math
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_binq.calibration.block_loss import BlockCriterion, interaction_errors
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.options import BlockTuning, ClosedForm
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.models.blocks import run_block

CPU = torch.device("cpu")
D = 4


def outputs(windows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y^ and y (windows, 5, 4): correlated channels of very different sizes, and a massive token."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99)) @ torch.diag(torch.tensor([9.0, 1, 0.3, 0.1]))
    y = torch.randn(windows, 5, D, generator=g) @ mix
    y[0, 0] *= 100
    return y + 0.3 * y.norm(dim=-1, keepdim=True) * torch.randn(windows, 5, D, generator=g) / 2, y


def plain_similarity(y_hat: Tensor, y: Tensor) -> float:
    """Sum over windows of the squared differences of all pairs' cosines, over T^2."""
    total = 0.0
    for a, b in zip(y_hat.double(), y.double(), strict=True):
        for i in range(len(a)):
            for j in range(len(a)):
                cosines = [float(t[i] @ t[j] / (t[i].norm() * t[j].norm())) for t in (a, b)]
                total += (cosines[0] - cosines[1]) ** 2 / len(a) ** 2
    return total


def plain_loss(interaction: float, y_hat: Tensor, y: Tensor) -> float:
    """The loss of a batch from the definitions, in float64."""
    pairs = zip(y_hat.double().reshape(-1, y.shape[-1]), y.double().reshape(-1, y.shape[-1]), strict=True)
    ratios = [float((a - b).norm() ** 2 / b.norm() ** 2) for a, b in pairs]
    return sum(ratios) / len(ratios) + (interaction * plain_similarity(y_hat, y) / len(y) if interaction else 0.0)


@pytest.mark.parametrize("interaction", [0.0, 0.1, 3.0])
def test_the_loss_is_its_definition(interaction: float) -> None:
    y_hat, y = outputs()
    loss = BlockCriterion(interaction).loss(y_hat, y)
    assert float(loss) == pytest.approx(plain_loss(interaction, y_hat, y), rel=1e-4)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("interaction", [0.0, 0.7])
def test_scores_add_up_over_batches_and_are_the_loss_of_all(interaction: float) -> None:
    """Whatever the batches: the score that chooses an epoch is what its steps minimise."""
    y_hat, y = outputs()
    c = BlockCriterion(interaction)
    parts = [torch.stack(c.sums(y_hat[a:b], y[a:b])).double() for a, b in ((0, 1), (1, 4), (4, 6))]
    sums = torch.stack(parts).sum(0)
    torch.testing.assert_close(sums, torch.stack(c.sums(y_hat, y)).double(), rtol=1e-5, atol=1e-5)
    assert float(sums[0] / sums[1]) == pytest.approx(float(c.loss(y_hat, y)), rel=1e-5)


def test_interactions_do_not_depend_on_the_size_of_tokens() -> None:
    y_hat, y = outputs()
    sizes = torch.rand(6, 5, 1, generator=torch.Generator().manual_seed(1)) * 100 + 0.1
    assert float(interaction_errors(y_hat, y)) == pytest.approx(plain_similarity(y_hat, y), rel=1e-4)
    assert float(interaction_errors(y_hat * sizes, y)) == pytest.approx(plain_similarity(y_hat, y), rel=1e-4)
    assert float(interaction_errors(y * sizes, y)) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    assert float(interaction_errors(y @ turn, y)) == pytest.approx(0, abs=1e-9)  # turned all alike: same similarities


def test_gradients_are_finite_and_those_of_the_definition() -> None:
    """Against differences of the float64 definition; a token of zeros spoils nothing."""
    y_hat, y = outputs(2)
    y_hat.requires_grad_()
    c = BlockCriterion(0.5)
    c.loss(y_hat, y).backward()
    assert y_hat.grad is not None
    for place in ((0, 1, 2), (1, 4, 0), (1, 2, 3)):
        step = 1e-5 * float(y[place[0], place[1]].norm())
        values = []
        for sign in (1, -1):
            moved = y_hat.detach().double().clone()
            moved[place] += sign * step
            values.append(plain_loss(0.5, moved, y))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(y_hat.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    zero = torch.zeros(1, 3, D, requires_grad=True)
    c.loss(zero, outputs(1)[1][:, :3]).backward()
    assert zero.grad is not None
    assert torch.isfinite(zero.grad).all()


def test_under_autocast_the_loss_is_in_float32() -> None:
    """The similarities too: bfloat16 would make a difference of 1e-3 out of equal outputs."""
    y_hat, y = outputs()
    c = BlockCriterion(0.5)
    rounded = y_hat.bfloat16()
    expected = c.loss(rounded.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(c.loss(rounded, y), expected)
        assert float(c.loss(y, y)) < 1e-9


def test_the_loss_waits_for_nothing() -> None:
    """On tensors without values: whoever asked the device for a number could not go on, nor be captured as a graph."""
    mode = FakeTensorMode()
    y_hat, y = (mode.from_tensor(torch.ones(2, 5, D)) for _ in range(2))
    with mode:
        y_hat.requires_grad_()
        loss = BlockCriterion(0.5).loss(y_hat, y)
        loss.backward()
        assert loss.shape == ()
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):  # what asking would look like
            float(loss.detach())


# ---- in a block stage ----------------------------------------------------------------------------------------------

TRAIN, HELD_OUT, TOKENS = 6, 2, 12


def workspace(kind: str = "llama", graphs: bool = False, device: torch.device = CPU) -> Workspace:
    windows = torch.randint(VOCAB, (TRAIN + HELD_OUT, TOKENS), generator=torch.Generator().manual_seed(0))
    return Workspace(tiny_model(kind), windows, HELD_OUT, device, StreamOptions(batch_windows=4), torch.float16, graphs)


def stage_with(tuning: BlockTuning, work: Workspace | None = None) -> BlockStage:
    stage = BlockStage(work or workspace(), 0, ClosedForm(), tuning)
    stage.enter()
    return stage


@pytest.mark.parametrize("interaction", [0.0, 0.5])
def test_a_stage_steps_and_scores_by_the_same_loss(interaction: float) -> None:
    stage = stage_with(BlockTuning(epochs=1, interaction=interaction))
    s = stage.work.streams
    with torch.no_grad():
        y_hat = run_block(stage.module, s.x_tilde, stage.call)
    rows = [4, 1]
    expected = plain_loss(interaction, y_hat[rows], s.y[rows])
    assert float(stage.loss(torch.tensor(rows)).detach()) == pytest.approx(expected, rel=1e-3)
    for held_out, part in ((False, slice(0, TRAIN)), (True, slice(TRAIN, None))):
        sums = stage.evaluate(held_out=held_out)
        assert sums.dtype == torch.float64
        assert float(sums[0] / sums[1]) == pytest.approx(plain_loss(interaction, y_hat[part], s.y[part]), rel=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_steps_lower_it(interaction: float, autocast: bool) -> None:
    stage = stage_with(BlockTuning(epochs=1, lr_codes=0.02, interaction=interaction))
    optimizer = torch.optim.AdamW(stage.parameter_groups(), weight_decay=0.0)
    before = torch.div(*stage.evaluate(held_out=False))
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stage.loss(torch.arange(TRAIN)).backward()
        optimizer.step()
    assert torch.div(*stage.evaluate(held_out=False)) < 0.95 * before


def test_the_interaction_term_makes_interactions_better() -> None:
    """With nothing else to tell the two runs apart."""
    left = []
    for interaction in (0.0, 100.0):
        stage = stage_with(BlockTuning(epochs=1, lr_codes=0.02, interaction=interaction))
        optimizer = torch.optim.AdamW(stage.parameter_groups(), weight_decay=0.0)
        for _ in range(60):
            optimizer.zero_grad()
            stage.loss(torch.arange(TRAIN)).backward()
            optimizer.step()
        s = stage.work.streams
        with torch.no_grad():
            left.append(float(interaction_errors(run_block(stage.module, s.x_tilde, stage.call), s.y)))
    assert left[1] < 0.9 * left[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_are_captured_on_a_gpu(autocast: bool) -> None:
    """A replay gives the loss and the gradients of the ordinary way."""
    found = []
    for graphs in (False, True):
        stage = stage_with(
            BlockTuning(epochs=1, interaction=0.5), workspace(graphs=graphs, device=torch.device("cuda"))
        )
        parameters = [p for group in stage.parameter_groups() for p in group["params"]]
        losses = []
        for rows in ([0, 1, 2], [3, 4, 5]):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                losses.append(stage.loss(torch.tensor(rows)))
            losses[-1].backward()
        found.append((torch.stack(losses).detach(), [p.grad.clone() for p in parameters if p.grad is not None]))
        assert (stage._loss._graphed is not None) == graphs
    tolerance = 3e-2 if autocast else 1e-4
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(float(a.abs().max()), 1e-6))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": -1.0}, r"tuning\.interaction: got -1"),
        ({"interaction": math.inf}, r"tuning\.interaction: got inf"),
        ({"interaction": math.nan}, r"tuning\.interaction: got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LitBinqError, match=message) as caught:
        BlockTuning(**options)
    assert "\n" not in str(caught.value)
