"""The two-plane layer in training: ordered latents, gradients, learning rates, autocast and capture."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_binq.formats import InputFormat, TwoPlane, TwoPlaneLinear
from lit_binq.formats.activations import codes, plain_scales
from two_planes import quantized, weight


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_pushed_latent_passes_the_levels_in_order(levels: int) -> None:
    """From the lowest to the highest weight: never past a level that lies between."""
    numbers = torch.tensor([-3.0, 1.0, 0.5, 3.0]) if levels == 4 else torch.tensor([0.5, 2.0, 1.0])[3 - levels :]
    s = TwoPlane(numbers[None, None], torch.zeros(1, 1, dtype=torch.uint8), 8)
    latent = s.pack().latent(True)
    met = []
    for _ in range(1000):
        met.append(float(latent.solution().dense()))
        (-latent(torch.ones(1, 1)).sum()).backward()
        with torch.no_grad():
            latent.v -= 0.003 * latent.v.grad
        latent.v.grad = None
    m = 0.5 * (levels == 3)
    wanted = [-3.0, 0.5, 1.0, 3.0] if levels == 4 else [m - 3, m - 1, m + 1, m + 3]
    assert list(dict.fromkeys(met)) == wanted


def test_a_latent_begins_where_its_target_lies_between_the_thresholds() -> None:
    s = TwoPlane(torch.tensor([[[-3.0, 1.0, -1.0, 3.0]]]), torch.tensor([[0, 2, 1, 3, 0, 0, 3, 2]]).byte(), 8)
    target = torch.tensor([[-3.0, -0.5, 1.0, 2.001, -9.0, 5.0, 4.0, -1.9]])
    latent = s.pack().latent(True, target)
    # levels -3, -1, 1, 3 have bounds -2, 0, 2: v = target / 2, as far as the code of the weight allows
    wanted = torch.tensor([[-1.5, -0.25, 0.5, 1.05, -3.0, -1.05, 2.0, -0.95]])
    torch.testing.assert_close(latent.v.detach(), wanted)
    torch.testing.assert_close(
        s.pack().latent(True).v.detach(), torch.tensor([[-1.5, -0.5, 0.5, 1.5, -1.5, -1.5, 1.5, -0.5]])
    )
    assert torch.equal(latent.solution().codes, s.codes)


@pytest.mark.parametrize("P", [0, 8])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_gradients_are_those_of_the_dense_weight(levels: int, P: int) -> None:
    """Levels' by finite differences; latents' as dL/dW times the mean step from level to level."""
    N, K = 4, 29
    layer = weight(N, K, levels=levels, P=P, seed=3).pack()
    latent = layer.latent(True).double()
    x, probe = torch.randn(6, K, dtype=torch.float64, requires_grad=True), torch.randn(6, N, dtype=torch.float64)
    (latent(x) * probe).sum().backward()
    dense = layer.dequantize().double()
    torch.testing.assert_close(x.grad, probe @ dense)
    dL_dW = (probe.T @ x.detach())[:, layer.order]
    stored = layer.solution().stored_dense().double()
    assert latent.v.grad is not None
    for group in range(-(-K // 8)):
        columns = slice(8 * group, min(8 * group + 8, K))
        four = torch.stack(
            [
                TwoPlane(layer.levels.double()[:, group : group + 1], torch.full((N, 1), c).byte(), 8).stored_dense()[
                    :, 0
                ]
                for c in range(4)
            ]
        )
        step = (four.amax(0) - four.amin(0)) / 3
        assert ((stored[:, columns] - four.amin(0)[:, None]) >= 0).all()
        torch.testing.assert_close(latent.v.grad[:, columns], dL_dW[:, columns] * step[:, None])
    (p,) = latent.scale_parameters()
    direction = torch.randn_like(p)
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            p.add_(direction, alpha=step)
            values.append(float((latent(x) * probe).sum()))
            p.sub_(direction, alpha=step)
    assert p.grad is not None
    assert float((p.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("static", [False, True])
def test_gradients_with_quantized_inputs(static: bool) -> None:
    """zeta and rho get the derivative of x^ with its codes fixed, the input its gradient unchanged."""
    N, K, P = 5, 32, 8
    layer = weight(N, K, P=P, bits=4, static=static, seed=1).pack()
    latent = layer.latent(True)
    x, probe = torch.randn(6, K, requires_grad=True), torch.randn(6, N)
    (latent(x) * probe).sum().backward()
    dense = layer.dequantize()
    torch.testing.assert_close(x.grad, probe @ dense)
    q, _, R = codes(
        x.detach()[:, layer.order], bits=4, outliers=P, scales=layer.input_scales, input_range=layer.input_range
    )
    slope = (probe @ layer.solution().stored_dense())[:, P:] * R[:, :1]
    wanted = torch.stack([slope.sum(), *((slope * (q[:, P:] >> k & 1)).sum() for k in range(4))])
    scales = latent.scale_parameters()[1]
    torch.testing.assert_close(scales.grad, wanted, rtol=1e-4, atol=1e-3)
    x_hat = quantized(x.detach(), layer.inputs())[:, layer.order]
    assert latent.levels.grad is not None
    one_hot = nn.functional.one_hot(layer.solution().codes.long(), 4).float()
    by_hand = torch.einsum("nk,nkc->nkc", probe.T @ x_hat, one_hot).unflatten(1, (-1, 8)).sum(2) * latent.base
    torch.testing.assert_close(latent.levels.grad, by_hand, rtol=1e-3, atol=1e-3)


def test_plain_scales_stay_plain() -> None:
    """Who asks for plain INT4 gets it after tuning too, through packing and latents again."""
    fitted = weight(6, 24, P=8, bits=4, seed=1)
    latent = fitted.with_inputs(InputFormat(4, fitted.inputs.outliers)).pack().latent(True)
    assert latent.scale_parameters() == [latent.levels]
    again = latent.pack()
    assert isinstance(again, TwoPlaneLinear)
    assert torch.equal(again.input_scales, plain_scales().half())
    x = torch.randn(5, 24)
    torch.testing.assert_close(latent(x), again(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_training_moves_all_there_is_and_packs(levels: int, bits: int) -> None:
    torch.manual_seed(0)
    layer = weight(6, 24, levels=levels, P=8, bits=bits, seed=1).pack(torch.zeros(6))
    latent = layer.latent(True, torch.randn(6, 24))
    optimizer = torch.optim.Adam(
        [{"params": latent.code_parameters(), "lr": 0.03}, {"params": latent.scale_parameters(), "lr": 0.01}]
    )
    x, y = torch.randn(96, 24), torch.randn(96, 6)
    losses = []
    for _ in range(30):
        loss = (latent(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    packed = latent.pack()
    assert isinstance(packed, TwoPlaneLinear)
    for name in ("codes", "selector", "levels", *["input_scales"] * (bits == 4)):
        assert not torch.equal(packed.get_buffer(name), layer.get_buffer(name)), name
    assert torch.equal(packed.outlier_bits, layer.outlier_bits)
    torch.testing.assert_close(packed.dequantize(), latent.solution().dense(), rtol=2e-3, atol=2e-3)
    # Rounding zeta and rho to float16 may move a value over the middle between two codes, hence the looser bound.
    with torch.no_grad():
        assert float((packed(x) - latent(x)).norm() / latent(x).norm()) < 0.02
    frozen = layer.latent(False)
    assert {p for p in frozen.parameters() if p.requires_grad} == set(frozen.scale_parameters())


@pytest.mark.parametrize("levels", [3, 4])
def test_one_learning_rate_serves_levels_of_all_sizes(levels: int) -> None:
    """Parameters have mean size about 1, in every group, and a mean near zero moves as far as its group's sizes."""
    s = weight(8, 32, levels=levels)
    s.codes[:] = torch.arange(32) % 4  # every level is used
    s.levels *= 2.0 ** torch.arange(-8, 0)[:, None, None]
    s.levels[..., 0] *= 1e-3
    latent = s.pack().latent(True)
    p = latent.levels.detach().clone()
    assert (p.abs().mean(-1) > 0.7).all()
    assert (p.abs().mean(-1) < 1.5).all()
    before = latent.solution().dense()
    optimizer = torch.optim.Adam([latent.levels], lr=0.01)
    latent(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    moved = (latent.solution().dense() - before).abs().mean(1) / before.abs().mean(1)
    assert (moved < 0.05).all()
    assert (moved > 0.001).all()
    assert ((latent.levels.detach() - p)[..., 0].abs() > 0.005).all()


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_step_under_autocast(bits: int) -> None:
    layer = weight(6, 32, P=8, bits=bits).pack(torch.zeros(6))
    latent, x = layer.latent(True), torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, packed = latent(x), layer(x)
        loss = y.float().square().sum()
    loss.backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, packed.to(y.dtype), rtol=2e-2, atol=2e-2)
    for p in (*latent.code_parameters(), *latent.scale_parameters()):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all()
        assert p.grad.abs().sum() > 0


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_no_shape_or_value_depends_on_data(bits: int) -> None:
    """Tensors without values go through forward and backward: what a CUDA graph needs."""
    latent = weight(6, 32, P=8, bits=bits).pack().latent(True)
    with FakeTensorMode() as mode:
        for store in (latent._parameters, latent._buffers):
            for name, t in store.items():
                if t is not None:
                    store[name] = mode.from_tensor(t)
        latent(torch.randn(5, 32)).sum().backward()
        assert latent.v.grad is not None
        assert latent.v.grad.shape == (6, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_step_can_be_captured(bits: int) -> None:
    layer = weight(16, 64, P=8, bits=bits).pack().cuda()
    eager, captured = layer.latent(True), layer.latent(True)
    x = torch.randn(5, 64, device="cuda")
    graphed = torch.cuda.make_graphed_callables(captured, (x.clone(),))
    for module in (eager, graphed):
        module(x).square().sum().backward()
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
