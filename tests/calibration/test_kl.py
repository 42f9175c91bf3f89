"""The divergence of next-token distributions against torch.distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.calibration.kl import kl_divergence


def logits(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_kl_is_torch_distributions(scale: float) -> None:
    student, teacher = logits(0, scale), logits(1, scale)
    p, q = (torch.distributions.Categorical(logits=t.double()) for t in (teacher, student))
    expected = float(torch.distributions.kl_divergence(p, q).mean())  # over all 6 tokens
    assert float(kl_divergence(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(torch.distributions.kl_divergence(q, p).mean()), rel=1e-3)


def test_kl_of_equal_distributions_is_zero() -> None:
    assert float(kl_divergence(logits(0), logits(0))) == pytest.approx(0, abs=1e-7)
    assert float(kl_divergence(logits(0) + 5, logits(0))) == pytest.approx(0, abs=1e-6)  # a shift changes nothing
    assert float(kl_divergence(logits(0), logits(1))) > 0


def test_kl_of_extreme_and_half_precision_logits_is_finite() -> None:
    assert torch.isfinite(kl_divergence(logits(0, 1e4), logits(1, 1e4)))
    assert kl_divergence(logits(0).bfloat16(), logits(1).bfloat16()).dtype == torch.float32


def test_gradient_of_the_kl() -> None:
    """(q - p) / tokens with respect to the student's logits, none for the teacher's."""
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    kl_divergence(student, teacher).backward()
    torch.testing.assert_close(student.grad, ((student.softmax(-1) - teacher.softmax(-1)) / 6).detach())
    assert teacher.grad is None


def plain_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64, by torch's own function and automatic differentiation."""
    x = student.detach().double().requires_grad_()
    log_q, log_p = torch.log_softmax(x, -1), torch.log_softmax(teacher.double(), -1)
    value = torch.nn.functional.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), reduction="batchmean", log_target=True)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    positions=st.integers(1, 20),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_kl_and_gradient_are_torchs_in_float64(
    shape: tuple[int, int, int], positions: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """However many tokens are widened at a time; +-1e4 makes every distribution a single peak."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = ((scale * torch.randn(shape, generator=g)).clamp(-1e4, 1e4).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = kl_divergence(student, teacher, positions)
    (3 * loss).backward()
    value, gradient = plain_kl(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-5, atol=1e-6)
    assert student.grad is not None
    assert student.grad.dtype == dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(student.grad.double(), 3 * gradient, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_have_no_gradient(dtype: torch.dtype) -> None:
    student = logits(0, 1e4).to(dtype).requires_grad_()
    kl_divergence(student, student.detach().clone(), 2).backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_a_loss_scale_keeps_half_precision_gradients_alive() -> None:
    """(q - p) / tokens of many tokens is below what float16 holds; times the scale of mixed precision it is not."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 256, 512, generator=g).half()
    student = (teacher.float() + 0.01 * torch.randn(teacher.shape, generator=g)).half().requires_grad_()
    (2.0**16 * kl_divergence(student, teacher)).backward()
    _, gradient = plain_kl(student, teacher)
    assert student.grad is not None
    assert float((student.grad.double() / 2**16 - gradient).norm() / gradient.norm()) < 0.02


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    with torch.no_grad():
        assert not kl_divergence(logits(0).requires_grad_(), logits(1)).requires_grad
