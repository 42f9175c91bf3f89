"""The two relative errors of a block's output against brute force."""

import pytest
import torch
from torch import Tensor

from lit_binq.diagnostics.similarity import block_error_sums, token_error_sums

SUMS = {"token": token_error_sums, "block": block_error_sums}


def outputs(windows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y^ and y (windows, 5, 4), one token of y a hundred times the size of the others."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(windows, 5, 4, generator=g)
    y[0, 0] *= 100
    return y + 0.3 * torch.randn(windows, 5, 4, generator=g), y


def test_block_error_is_the_relative_squared_error() -> None:
    y_hat, y = outputs()
    error, norm = block_error_sums(y_hat, y)
    pairs = list(zip(y_hat.double().flatten().tolist(), y.double().flatten().tolist(), strict=True))
    assert float(error) == pytest.approx(sum((a - b) ** 2 for a, b in pairs), rel=1e-5)
    assert float(norm) == pytest.approx(sum(b**2 for _, b in pairs), rel=1e-5)


def test_token_error_is_the_mean_of_each_tokens_relative_error() -> None:
    y_hat, y = outputs()
    error, count = token_error_sums(y_hat, y)
    tokens = zip(y_hat.double().reshape(-1, 4), y.double().reshape(-1, 4), strict=True)
    assert float(error) == pytest.approx(sum(float((a - b).norm() ** 2 / b.norm() ** 2) for a, b in tokens), rel=1e-5)
    assert float(count) == y.shape[0] * y.shape[1]


@pytest.mark.parametrize("kind", SUMS)
def test_sums_over_batches_add_up(kind: str) -> None:
    y_hat, y = outputs()
    whole = torch.stack(SUMS[kind](y_hat, y))
    parts = sum(torch.stack(SUMS[kind](y_hat[a:b], y[a:b])) for a, b in ((0, 1), (1, 4), (4, 6)))
    torch.testing.assert_close(whole, parts)
    assert whole.dtype == torch.float32


def test_only_the_block_error_is_ruled_by_a_massive_token() -> None:
    """Spoiling every ordinary token moves the token error; the block error hardly sees it."""
    _, y = outputs()
    spoiled = y.clone()
    spoiled[1:] = 0
    relative = {k: float(torch.div(*sums(spoiled, y))) for k, sums in SUMS.items()}
    assert relative["token"] == pytest.approx(5 / 6)
    assert relative["block"] < 0.01


@pytest.mark.parametrize("kind", SUMS)
def test_equal_outputs_have_no_error_even_where_they_are_zero(kind: str) -> None:
    y = torch.zeros(1, 3, 4)
    y[0, 1] = 1
    error, weight = SUMS[kind](y, y)
    assert float(error) == 0
    assert float(weight) > 0


@pytest.mark.parametrize("kind", SUMS)
def test_half_precision_outputs_are_compared_in_float32(kind: str) -> None:
    y_hat, y = outputs()
    error, weight = SUMS[kind](y_hat.bfloat16(), y)
    assert error.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(error, SUMS[kind](y_hat.bfloat16().float(), y)[0])


@pytest.mark.parametrize("kind", SUMS)
def test_gradient_of_the_block_errors(kind: str) -> None:
    """By hand: 2 (y^ - y), over the token's norm for `token`."""
    y_hat, y = outputs(2)
    y_hat.requires_grad_()
    SUMS[kind](y_hat, y)[0].backward()
    by_hand = 2 * (y_hat - y).detach()
    if kind == "token":
        by_hand = by_hand / y.square().sum(-1, keepdim=True)
    torch.testing.assert_close(y_hat.grad, by_hand)
