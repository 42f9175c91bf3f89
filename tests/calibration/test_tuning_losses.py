"""What a block's tuning minimises: by hand and in a stage."""

import math
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_binq.calibration.block_loss import DAMPING, BlockCriterion, interaction_errors, output_metric
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.stages import CODES, ClosedForm, Tuning
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentLinear
from lit_binq.models.blocks import find_layers, run_block
from lit_binq.statistics.losses import block_errors

CPU = torch.device("cpu")
KINDS = ("token", "block", "channel", "whitened")
D = 4


def outputs(windows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y^ and y (windows, 5, 4): correlated channels of very different sizes, and a massive token."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99)) @ torch.diag(torch.tensor([9.0, 1, 0.3, 0.1]))
    y = torch.randn(windows, 5, D, generator=g) @ mix
    y[0, 0] *= 100
    return y + 0.3 * y.norm(dim=-1, keepdim=True) * torch.randn(windows, 5, D, generator=g) / 2, y


def unit_gram(y: Tensor) -> Tensor:
    """E[u u^T] of the tokens' directions, one by one, in float64."""
    tokens = y.double().reshape(-1, y.shape[-1])
    return sum(torch.outer(t, t) / float(t @ t) for t in tokens) / len(tokens)  # type: ignore[return-value]  # sum of tensors


def plain_metric(kind: str, M: Tensor) -> Tensor:
    """(d, d) float64: the inverse square root by eigenvalues, of the diagonal alone for `channel`."""
    M = M.double()
    damped = (torch.diag(M.diagonal()) if kind == "channel" else M) + DAMPING * M.diagonal().mean() * torch.eye(len(M))
    values, vectors = torch.linalg.eigh(damped)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def plain_similarity(y_hat: Tensor, y: Tensor) -> float:
    """Sum over windows of the squared differences of all pairs' cosines, over T^2."""
    total = 0.0
    for a, b in zip(y_hat.double(), y.double(), strict=True):
        for i in range(len(a)):
            for j in range(len(a)):
                cosines = [float(t[i] @ t[j] / (t[i].norm() * t[j].norm())) for t in (a, b)]
                total += (cosines[0] - cosines[1]) ** 2 / len(a) ** 2
    return total


def plain_loss(kind: str, interaction: float, y_hat: Tensor, y: Tensor, M: Tensor, mean_square: float) -> float:
    """The loss of a batch from the definitions, in float64."""
    y_hat, y = y_hat.double(), y.double()
    if kind == "block":
        value = float((y_hat - y).square().mean()) / mean_square
    else:
        P = torch.eye(y.shape[-1], dtype=torch.float64) if kind == "token" else plain_metric(kind, M)
        pairs = zip(y_hat.reshape(-1, y.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
        ratios = [float((P @ (a - b)).norm() ** 2 / (P @ b).norm() ** 2) for a, b in pairs]
        value = sum(ratios) / len(ratios)
    return value + (interaction * plain_similarity(y_hat, y) / len(y) if interaction else 0.0)


def criterion(kind: Any, y: Tensor, interaction: float = 0.0) -> BlockCriterion:
    metric = output_metric(kind, unit_gram(y).float()) if kind in ("channel", "whitened") else None
    return BlockCriterion(kind, y.square().mean(), metric, interaction)


@pytest.mark.parametrize("interaction", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_definition(kind: str, interaction: float) -> None:
    y_hat, y = outputs()
    expected = plain_loss(kind, interaction, y_hat, y, unit_gram(y), float(y.double().square().mean()))
    loss = criterion(kind, y, interaction).loss(y_hat, y)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("interaction", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_add_up_over_batches_and_are_the_loss_of_all(kind: str, interaction: float) -> None:
    """Whatever the batches: the score that chooses an epoch is what its steps minimise."""
    y_hat, y = outputs()
    c = criterion(kind, y, interaction)
    parts = [torch.stack(c.sums(y_hat[a:b], y[a:b])).double() for a, b in ((0, 1), (1, 4), (4, 6))]
    sums = torch.stack(parts).sum(0)
    torch.testing.assert_close(sums, torch.stack(c.sums(y_hat, y)).double(), rtol=1e-5, atol=1e-5)
    assert float(sums[0] / sums[1]) == pytest.approx(float(c.loss(y_hat, y)), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 6), tokens=st.integers(1, 12), power=st.integers(-3, 3), seed=st.integers(0, 1000))
def test_the_metric_is_the_inverse_square_root(d: int, tokens: int, power: int, seed: int) -> None:
    """P (M + D) P = I, also where M has fewer directions than channels."""
    M = unit_gram(10.0**power * torch.randn(1, tokens, d, generator=torch.Generator().manual_seed(seed)))
    damping = DAMPING * M.diagonal().mean()
    P = output_metric("whitened", M.float()).double()
    identity = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(P @ (M + damping * identity) @ P, identity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(P, P.T)
    p = output_metric("channel", M.float()).double()
    torch.testing.assert_close(p.square() * (M.diagonal() + damping), torch.ones(d, dtype=torch.float64))


def test_a_metric_of_nothing_and_of_nonsense() -> None:
    torch.testing.assert_close(output_metric("whitened", torch.zeros(3, 3)), torch.eye(3))
    torch.testing.assert_close(output_metric("channel", torch.zeros(3, 3)), torch.ones(3))
    for kind in ("channel", "whitened"):
        with pytest.raises(LitBinqError, match=r"tuning\.loss: the block's full-precision outputs hold NaN or inf"):
            output_metric(kind, torch.full((2, 2), math.nan))  # type: ignore[arg-type]  # a name out of a loop
    with pytest.raises(ValueError, match="kind 'whitened' needs a metric"):
        block_errors(*outputs(), "whitened")


def test_weak_channels_and_directions_count() -> None:
    """y on two channels, the second a hundredth of the first; then the same turned by 45 degrees."""
    y = torch.randn(1, 400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.1])
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    spoiled = y * torch.tensor([1.0, 0.0])
    losses = {kind: float(criterion(kind, y).loss(spoiled, y)) for kind in KINDS}
    turned = {kind: float(criterion(kind, y @ turn).loss(spoiled @ turn, y @ turn)) for kind in KINDS}
    assert losses["block"] < 0.02
    assert losses["channel"] > 2 * losses["token"]
    # Both channels have the same power after the turn, so only `whitened` still sees the weak direction.
    assert turned["channel"] == pytest.approx(turned["token"], rel=0.05)
    assert turned["whitened"] == pytest.approx(losses["whitened"], rel=1e-3)
    assert losses["whitened"] == pytest.approx(losses["channel"], rel=0.1)


def test_interactions_do_not_depend_on_the_size_of_tokens() -> None:
    y_hat, y = outputs()
    sizes = torch.rand(6, 5, 1, generator=torch.Generator().manual_seed(1)) * 100 + 0.1
    assert float(interaction_errors(y_hat, y)) == pytest.approx(plain_similarity(y_hat, y), rel=1e-4)
    assert float(interaction_errors(y_hat * sizes, y)) == pytest.approx(plain_similarity(y_hat, y), rel=1e-4)
    assert float(interaction_errors(y * sizes, y)) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    assert float(interaction_errors(y @ turn, y)) == pytest.approx(0, abs=1e-9)  # turned all alike: same similarities


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_those_of_the_definition(kind: str) -> None:
    """Against differences of the float64 definition; a token of zeros spoils nothing."""
    y_hat, y = outputs(2)
    y_hat.requires_grad_()
    c = criterion(kind, y, 0.5)
    c.loss(y_hat, y).backward()
    assert y_hat.grad is not None
    M, mean_square = unit_gram(y), float(y.double().square().mean())
    for place in ((0, 1, 2), (1, 4, 0), (1, 2, 3)):
        step = 1e-5 * float(y[place[0], place[1]].norm())
        values = []
        for sign in (1, -1):
            moved = y_hat.detach().double().clone()
            moved[place] += sign * step
            values.append(plain_loss(kind, 0.5, moved, y, M, mean_square))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(y_hat.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    zero = torch.zeros(1, 3, D, requires_grad=True)
    c.loss(zero, outputs(1)[1][:, :3]).backward()
    assert zero.grad is not None
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_loss_is_in_float32(kind: str) -> None:
    """The metric and the similarities too: bfloat16 would make a difference of 1e-3 out of equal outputs."""
    y_hat, y = outputs()
    c = criterion(kind, y, 0.5)
    rounded = y_hat.bfloat16()
    expected = c.loss(rounded.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(c.loss(rounded, y), expected)
        assert float(c.loss(y, y)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_waits_for_nothing(kind: Any) -> None:
    """On tensors without values: whoever asked the device for a number could not go on, nor be captured as a graph."""
    metric = {"channel": torch.ones(D), "whitened": torch.eye(D)}.get(kind)
    mode = FakeTensorMode()
    y_hat, y, mean_square = (mode.from_tensor(t) for t in (torch.ones(2, 5, D), torch.ones(2, 5, D), torch.ones(())))
    metric = None if metric is None else mode.from_tensor(metric)
    with mode:
        y_hat.requires_grad_()
        loss = BlockCriterion(kind, mean_square, metric, 0.5).loss(y_hat, y)
        loss.backward()
        assert loss.shape == ()
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):  # what asking would look like
            float(loss.detach())


# ---- in a block stage ----------------------------------------------------------------------------------------------

TRAIN, HELD_OUT, TOKENS = 6, 2, 12


def workspace(kind: str = "llama", graphs: bool = False, device: torch.device = CPU) -> Workspace:
    windows = torch.randint(VOCAB, (TRAIN + HELD_OUT, TOKENS), generator=torch.Generator().manual_seed(0))
    return Workspace(tiny_model(kind), windows, HELD_OUT, device, StreamOptions(batch_windows=4), torch.float16, graphs)


def stage_with(tuning: Tuning, work: Workspace | None = None) -> BlockStage:
    stage = BlockStage(work or workspace(), 0, ClosedForm(), tuning)
    stage.enter()
    return stage


@pytest.mark.parametrize("interaction", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_steps_and_scores_by_the_same_loss(kind: Any, interaction: float) -> None:
    """The metric comes from the training windows alone."""
    stage = stage_with(Tuning(epochs=1, loss=kind, interaction=interaction))
    s = stage.work.streams
    with torch.no_grad():
        y_hat = run_block(stage.module, s.x_tilde, stage.call)
    M, mean_square = unit_gram(s.y[:TRAIN]), float(s.y[:TRAIN].double().square().mean())
    torch.testing.assert_close(s.unit_gram().double(), M, rtol=1e-4, atol=1e-6)
    rows = [4, 1]
    expected = plain_loss(kind, interaction, y_hat[rows], s.y[rows], M, mean_square)
    assert float(stage.loss(torch.tensor(rows)).detach()) == pytest.approx(expected, rel=1e-3)
    for held_out, part in ((False, slice(0, TRAIN)), (True, slice(TRAIN, None))):
        energy = float(s.y[part].double().square().mean())
        # `block` is relative to the windows that are scored.
        expected = plain_loss(kind, 0.0, y_hat[part], s.y[part], M, energy)
        if interaction:
            share = mean_square / energy if kind == "block" else 1.0
            similarity = plain_similarity(y_hat[part], s.y[part]) / len(s.y[part])
            expected += interaction * share * similarity
        sums = stage.evaluate(held_out=held_out)
        assert sums.dtype == torch.float64
        assert float(sums[0] / sums[1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "interaction"), [*((k, 0.0) for k in KINDS), ("token", 1.0)])
def test_steps_lower_it(kind: Any, interaction: float, autocast: bool) -> None:
    stage = stage_with(Tuning(epochs=1, lr_codes=0.02, loss=kind, interaction=interaction))
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
        stage = stage_with(Tuning(epochs=1, lr_codes=0.02, interaction=interaction))
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
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_captured_on_a_gpu(kind: Any, autocast: bool) -> None:
    """A replay gives the loss and the gradients of the ordinary way."""
    found = []
    for graphs in (False, True):
        stage = stage_with(
            Tuning(epochs=1, loss=kind, interaction=0.5), workspace(graphs=graphs, device=torch.device("cuda"))
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


def test_codes_have_groups_of_their_own() -> None:
    """Even at the same learning rate as something else."""
    stage = stage_with(Tuning(epochs=1, lr_codes=1e-3, lr_norms=1e-3, lr_scales=1e-3))
    codes = {id(p) for m in find_layers(stage.module, LatentLinear).values() for p in m.code_parameters()}
    groups = stage.parameter_groups()
    assert {id(p) for g in groups if g["kind"] == CODES for p in g["params"]} == codes
    assert len(codes) == 7
    assert any(not codes & {id(p) for p in g["params"]} for g in groups)
    assert len({g["lr"] for g in groups if g["kind"] == CODES}) == 1


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": -1.0}, r"tuning\.interaction: got -1"),
        ({"interaction": math.inf}, r"tuning\.interaction: got inf"),
        ({"interaction": math.nan}, r"tuning\.interaction: got nan"),
        ({"codes_after": -0.1}, r"tuning\.codes_after: got -0\.1"),
        ({"codes_after": 1.0}, r"tuning\.codes_until: got 1\.0 with codes_after 1\.0"),
        ({"codes_until": 1.1}, r"tuning\.codes_until: got 1\.1"),
        ({"codes_until": 0.0}, r"tuning\.codes_until: got 0\.0 with codes_after 0\.0"),
        ({"codes_after": 0.5, "codes_until": 0.4}, r"tuning\.codes_until: got 0\.4 with codes_after 0\.5"),
        ({"codes_until": math.nan}, r"tuning\.codes_until: got nan"),
        ({"loss": "layer"}, r"tuning\.loss: got 'layer', expected one of token, block, channel, whitened"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LitBinqError, match=message) as caught:
        Tuning(**options)
    assert "\n" not in str(caught.value)
