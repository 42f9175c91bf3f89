"""Quantized inputs: values and codes against their definition, gradients, and the fit of the plane scales."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.formats.activations import (
    WeightedPoints,
    codes,
    fit_scales,
    mean_bits,
    outer_weights,
    plain_scales,
    plane_levels,
    quantize,
)

EMPTY = torch.empty(0)


def options(bits: int, outliers: int = 0, scales: Tensor | None = None, fixed: Tensor = EMPTY) -> dict[str, Any]:
    return {
        "bits": bits,
        "outliers": outliers,
        "scales": plain_scales() if scales is None else scales,
        "input_range": fixed,
    }


def random_scales(seed: int) -> Tensor:
    """Plane scales as a fit may leave them: of any order, some levels equal or outside the range."""
    g = torch.Generator().manual_seed(seed)
    scales = plain_scales() + 0.1 * torch.randn(5, generator=g)
    return scales * (torch.rand(5, generator=g) > 0.2)


def f32(value: Any) -> np.float32:
    return np.float32(value)


def by_definition(row: np.ndarray, bits: int, P: int, scales: Tensor, fixed: Tensor) -> tuple[list[int], list[float]]:
    """One token's codes and values, entry by entry; float32 where the definition has it."""
    q: list[int] = []
    out: list[float] = []
    split = len(row) if bits == 8 else P
    for part, values in ((1, row[:split]), (0, row[split:])):
        if not len(values):
            continue
        if len(fixed):
            lo, R = (f32(v) for v in fixed[2 * part : 2 * part + 2].tolist())
        else:
            lo, R = f32(values.min()), f32(values.max()) - f32(values.min())
        if part == 1:
            step = R / f32(255)
            for x in values:
                code = 0 if step == 0 else int(min(max(np.rint((x - lo) / step), 0), 255))
                q.append(code)
                out.append(float(lo + step * f32(code)))
            continue
        s = [f32(v) for v in scales.float().tolist()]
        level = []
        for b in range(16):
            total = s[0]
            for k in range(4):
                total = total + s[k + 1] if b >> k & 1 else total
            level.append(total)
        order = sorted(range(16), key=lambda b: (level[b], b))
        for x in values:
            u = f32(0) if R == 0 else (x - lo) / R
            below = sum(int((level[order[i]] + level[order[i + 1]]) * f32(0.5) < u) for i in range(15))
            q.append(order[below])
            out.append(float(lo + R * level[order[below]]))
    return q, out


tokens = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 3e4, -3e4, 1e-30, 1e-44, 0.5])
    | st.floats(-100, 100, width=32, allow_subnormal=False),
    min_size=17,
    max_size=17,
)


@given(
    token=tokens,
    bits=st.sampled_from([4, 8]),
    outliers=st.sampled_from([0, 8, 17]),
    static=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=150)
def test_codes_and_values_are_those_of_the_definition(
    token: list[float], bits: int, outliers: int, static: bool, seed: int
) -> None:
    """Bit for bit, for any scales: constant tokens, subnormal ranges, huge values, no 4-bit part."""
    scales = random_scales(seed)
    fixed = torch.tensor([-2.0, 3.5, -50.0, 90.0]) if static else EMPTY
    x = torch.tensor([token, token[::-1]])
    o = options(bits, outliers, scales, fixed)
    q, lo, R = codes(x, **o)
    x_hat = quantize(x, **o)
    assert q.dtype == torch.uint8
    assert lo.shape == R.shape == (2, 2)
    assert torch.isfinite(x_hat).all()
    for i in range(2):
        expected_q, expected = by_definition(x[i].numpy(), bits, outliers, scales, fixed)
        assert q[i].tolist() == expected_q
        assert x_hat[i].tolist() == [float(f32(v)) for v in expected]


@given(seed=st.integers(0, 1000), outliers=st.sampled_from([0, 8, 24]))
@settings(deadline=None, max_examples=50)
def test_planes_add_up(seed: int, outliers: int) -> None:
    """x^ = z + sum_k a_k q_jk from the codes, lo and R alone."""
    g = torch.Generator().manual_seed(seed)
    x, scales = torch.randn(3, 24, generator=g) * 10, random_scales(seed)
    o = options(4, outliers, scales)
    q, lo, R = (t.double() for t in codes(x, **o))
    lo4, R4, lo8, R8 = (t.unsqueeze(1) for t in (lo[:, 0], R[:, 0], lo[:, 1], R[:, 1]))
    planes = torch.stack([q.long() >> k & 1 for k in range(8)]).double()
    zeta, rho = scales[0].double(), scales[1:].double()
    eight = lo8 + sum(R8 / 255 * 2**k * planes[k] for k in range(8))
    four = lo4 + R4 * zeta + sum(R4 * rho[k] * planes[k] for k in range(4))
    expected = torch.cat((eight[:, :outliers], four[:, outliers:]), 1)
    torch.testing.assert_close(quantize(x, **o).double(), expected, rtol=1e-5, atol=1e-4)
    if outliers == 24:
        assert bool((lo[:, 0] == 0).all())  # a part without columns
        assert bool((R[:, 0] == 0).all())


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_no_level_is_nearer(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, scales = torch.randn(4, 20, generator=g).double().float(), random_scales(seed)
    error = (quantize(x, **options(4, 0, scales)) - x).abs().double()
    lo, R = x.amin(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    every = (lo + R * plane_levels(scales)).double()  # (4, 16)
    nearest = (every[:, None, :] - x.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-5)


def test_eight_bits_round_half_to_even() -> None:
    x = torch.tensor([[0.0, 255.0, 0.5, 1.5, 2.5, 254.5]])
    assert codes(x, **options(8))[0].tolist() == [[0, 255, 0, 2, 2, 254]]


def test_ties_go_to_the_lower_level() -> None:
    """Of levels 0, 1, 2, .. at steps of one, 0.5 is as near to 0 as to 1; patterns with one level take the first."""
    x = torch.tensor([[0.0, 15.0, 0.5, 7.5, 14.5]])
    exact = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0])
    fixed = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert codes(x, **options(4, 0, exact, fixed))[0].tolist() == [[0, 15, 0, 7, 14]]
    assert codes(x, **options(4, 0, torch.zeros(5), fixed))[0].tolist() == [[0, 15, 15, 15, 15]]


def test_constant_tokens_are_kept() -> None:
    x = torch.tensor([[3.25] * 9, [0.0] * 9, [-1e4] * 9])
    for o in (options(8), options(4), options(4, 8)):
        assert torch.equal(quantize(x, **o), x)
        assert not codes(x, **o)[0].any()


def test_zero_bits_leave_x_alone() -> None:
    x = torch.randn(2, 3)
    assert quantize(x, **options(0)) is x


def test_static_ranges_clamp() -> None:
    x = torch.tensor([[-9.0, 9.0, 0.5]])
    fixed = torch.tensor([0.0, 1.0, -1.0, 2.0])
    assert quantize(x, **options(4, 0, None, fixed))[0, :2].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert quantize(x, **options(8, 0, None, fixed))[0, :2].tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for o in (options(8), options(4, 8)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = quantize(x, **o)
        assert got.dtype == dtype
        assert torch.equal(got, quantize(x.float(), **o).to(dtype))


def test_gradient_of_scales_is_true_and_of_x_straight_through() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 24, generator=g).requires_grad_()
    scales = plain_scales().half().float().requires_grad_()
    weights = torch.randn(6, 24, generator=g)
    (quantize(x, **options(4, 8, scales)) * weights).sum().backward()
    assert torch.equal(x.grad, weights)  # type: ignore[arg-type]  # set by backward
    q, lo, R = codes(x, **options(4, 8, scales))
    bits = torch.stack([torch.ones(6, 16), *((q[:, 8:].long() >> k & 1).float() for k in range(4))], -1)
    free = scales.detach().clone().requires_grad_()
    x_hat = lo[:, :1] + R[:, :1] * (bits @ free)
    (x_hat * weights[:, 8:]).sum().backward()
    assert free.grad is not None
    assert scales.grad is not None
    torch.testing.assert_close(scales.grad, free.grad)
    assert scales.grad.abs().min() > 0.01


@pytest.mark.parametrize("outliers", [24, 0])
def test_gradient_without_a_part(outliers: int) -> None:
    scales = plain_scales().requires_grad_()
    quantize(torch.randn(2, 24), **options(4, outliers, scales)).sum().backward()
    assert scales.grad is not None
    assert bool((scales.grad != 0).any()) == (outliers == 0)


@pytest.mark.parametrize(
    ("bits", "outliers", "scales", "fixed", "match"),
    [
        (2, 0, plain_scales(), EMPTY, "expected 0, 4 or 8"),
        (4, 9, plain_scales(), EMPTY, "9 outlier columns of 8"),
        (4, 0, torch.ones(4), EMPTY, r"expected \(5,\)"),
        (8, 0, EMPTY, torch.ones(2), r"expected \(4,\)"),
    ],
)
def test_wrong_options_are_refused(bits: int, outliers: int, scales: Tensor, fixed: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantize(torch.zeros(1, 8), **options(bits, outliers, scales, fixed))


def test_no_codes_without_bits() -> None:
    with pytest.raises(ValueError, match="no codes"):
        codes(torch.zeros(1, 8), **options(0))


def test_mean_bits() -> None:
    assert mean_bits(64, 4, 16) == 5.0
    assert mean_bits(64, 8, 0) == 8.0
    assert mean_bits(64, 0, 0) == 16.0


# --- fitting the scales


def error(x: Tensor, scales: Tensor, weight: Tensor | None = None, rows: Tensor | None = None) -> float:
    fixed = options(4, 0, scales)
    return float((outer_weights(x, rows, weight) * (quantize(x, **fixed) - x).double().square()).sum())


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["normal", "heavy", "one-sided", "constant", "two-valued"]))
@settings(deadline=None, max_examples=40)
def test_fitted_scales_are_never_worse_than_plain(seed: int, kind: str) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 24, generator=g)
    if kind == "heavy":
        x = x**3 * 100
    elif kind == "one-sided":
        x = torch.nn.functional.silu(3 * x)
    elif kind == "constant":
        x = torch.full_like(x, 2.5)
    elif kind == "two-valued":
        x = x.sign()
    weight, rows = torch.rand(24, generator=g), torch.rand(40, generator=g)
    scales = fit_scales(x, weight, tokens=rows)
    assert torch.equal(scales, scales.half().float())
    assert error(x, scales, weight, rows) <= error(x, plain_scales().half().float(), weight, rows) * (1 + 1e-6)


@pytest.mark.parametrize(("gated", "gain"), [(False, 0.76), (True, 0.55)])
def test_fitted_scales_lower_the_error(gated: bool, gain: float) -> None:
    """Values crowd in the middle of the range: the heavier the tails, the more uneven levels gain.

    With evenly spread levels as the only start they would be 0.78 and 0.65.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 576, generator=g)
    if gated:
        x = torch.nn.functional.silu(2 * x) * torch.randn(200, 576, generator=g)
    assert error(x, fit_scales(x)) < gain * error(x, plain_scales())


def test_weights_count() -> None:
    """Two kinds of columns; levels go where the weight is. And a token counts by its weight as by its repetition."""
    g = torch.Generator().manual_seed(2)
    x = torch.cat((torch.randn(300, 16, generator=g) * 0.05, torch.randn(300, 16, generator=g)), 1)
    small = torch.tensor([1.0] * 16 + [0.0] * 16)
    assert error(x, fit_scales(x, small), small) < 0.7 * error(x, fit_scales(x, 1 - small), small)
    rows = torch.ones(300)
    rows[:100] = 3
    assert torch.equal(fit_scales(x, tokens=rows), fit_scales(torch.cat((x, x[:100], x[:100]))))


def test_alternation_finds_levels_that_fit_exactly() -> None:
    """Data made from other scales: what is left is far below the plain levels' error."""
    g = torch.Generator().manual_seed(3)
    true = torch.tensor([0.0, 0.09, 0.15, 0.26, 0.5])
    x = plane_levels(true)[torch.randint(16, (200, 48), generator=g)]
    x[:, 0], x[:, 1] = 0.0, 1.0
    assert error(x, fit_scales(x)) < 1e-3 * error(x, plain_scales())


def test_no_samples_give_plain_scales() -> None:
    plain = plain_scales().half().float()
    for x in (torch.zeros(0, 8), torch.zeros(8, 0), torch.zeros(3, 8)):
        assert torch.equal(fit_scales(x), plain)
    assert torch.equal(fit_scales(torch.randn(4, 8), torch.zeros(8)), plain)


def test_wrong_weights_are_refused() -> None:
    for weight in (torch.ones(3), -torch.ones(8)):
        with pytest.raises(ValueError, match="expected 8 numbers >= 0"):
            fit_scales(torch.randn(4, 8), weight)


def test_static_scales_are_fitted_to_the_fixed_range() -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(4))
    fixed = torch.tensor([-4.0, 8.0, 0.0, 0.0])
    scales = fit_scales(x, input_range=fixed)

    def left(s: Tensor) -> float:
        return float((quantize(x, **options(4, 0, s, fixed)) - x).square().sum())

    assert left(scales) < 0.7 * left(plain_scales())
    assert left(scales) < 0.9 * left(fit_scales(x))


def test_points_agree_with_brute_force() -> None:
    g = torch.Generator().manual_seed(5)
    u, w = torch.rand(50, generator=g), torch.rand(50, generator=g).double()
    levels = torch.rand(16, generator=g)
    expected = (w / w.max() * (u[:, None] - levels).double().square().amin(1)).sum()
    assert WeightedPoints(u, w).error(levels) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_forward_and_backward_can_be_captured() -> None:
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    scales = torch.nn.Parameter(plain_scales().cuda())
    empty = torch.empty(0, device="cuda")

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = scales

        def forward(self, x: Tensor) -> Tensor:
            return quantize(x, bits=4, outliers=8, scales=self.scales, input_range=empty).square().sum()

    expected = torch.autograd.grad(Step()(x), [scales])[0]
    step = torch.cuda.make_graphed_callables(Step(), (x.clone().detach().requires_grad_(),))
    loss = step(x)
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.testing.assert_close(scales.grad, expected)
