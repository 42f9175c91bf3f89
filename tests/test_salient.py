"""The salient format: counted bits, exact reload, ordered latents; its solver and the spending of a budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import RowColumn, Salient, SalientLinear
from lit_binq.formats.salient import stored_bits
from lit_binq.hub import describe_layer, empty_layer
from lit_binq.solvers import RowColumnSolver, SalientSolver, objective_value
from lit_binq.solvers.salient import choose_columns, most_columns


def plane(N: int, K: int, g: torch.Generator, size: float = 1.0) -> RowColumn:
    r, c = ((torch.rand(n, generator=g) + 0.1).half().float() for n in (N, K))
    return RowColumn(size * r, c, torch.randint(2, (N, K), generator=g).float() * 2 - 1)


def salient(N: int, K: int, k: int, seed: int = 0) -> Salient:
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(K, generator=g)[:k].sort().values
    return Salient(plane(N, K, g), plane(N, k, g, 0.5), columns)


def problem(N: int, K: int, seed: int = 0, tokens: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, K, generator=g) * torch.logspace(-1, 1, K)[torch.randperm(K, generator=g)]
    return torch.randn(N, K, generator=g), X.T @ X / tokens + 0.01 * torch.eye(K)


shapes = st.integers(1, 20).flatmap(lambda K: st.tuples(st.integers(1, 12), st.just(K), st.integers(1, K)))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 100), bias=st.booleans())
def test_stored_and_loaded_bit_for_bit(shape: tuple[int, int, int], seed: int, bias: bool) -> None:
    N, K, k = shape
    s = salient(N, K, k, seed)
    layer = s.pack(torch.randn(N) if bias else None)
    assert torch.equal(layer.dequantize(), s.dense())
    counted = sum(t.numel() * t.element_size() * 8 for t in layer.state_dict().values())
    assert layer.stored_bits() == stored_bits(N, K, k) == counted - 32 * N * bias
    linear = nn.Linear(K, N, bias=bias)
    again = empty_layer(linear, describe_layer(layer))
    again.load_state_dict(layer.state_dict())
    again.refresh()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.solution().columns, s.columns)
    reference = x.double() @ s.dense().double().T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(layer(x).double(), reference, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 100), codes=st.booleans(), target=st.booleans())
def test_latents_stand_for_the_stored_codes(shape: tuple[int, int, int], seed: int, codes: bool, target: bool) -> None:
    s = salient(*shape, seed)
    layer = s.pack()
    latent = layer.latent(codes, torch.randn(shape[:2]) if target else None)
    assert torch.equal(latent.pack().dequantize(), layer.dequantize())
    x = torch.randn(4, shape[1])
    torch.testing.assert_close(latent(x), layer(x), rtol=1e-4, atol=1e-4)
    assert bool(latent.code_parameters()) == codes


def test_a_pushed_latent_passes_the_levels_in_order() -> None:
    """From the lowest to the highest weight: never past a level that lies between."""
    s = Salient(
        RowColumn(torch.ones(1), torch.ones(1), -torch.ones(1, 1)),
        RowColumn(torch.full((1,), 0.5), torch.ones(1), -torch.ones(1, 1)),
        torch.tensor([0]),
    )
    latent = s.pack().latent(True)
    levels = []
    for _ in range(40):
        levels.append(float(latent.solution().dense()))
        loss = -latent(torch.ones(1, 1)).sum()
        loss.backward()
        with torch.no_grad():
            latent.v -= 0.1 * latent.v.grad
        latent.v.grad = None
    assert list(dict.fromkeys(levels)) == [-1.5, -0.5, 0.5, 1.5]


def test_contradictory_bitmaps_are_refused() -> None:
    layer = salient(3, 10, 4).pack()
    layer.column_bits[0] ^= 1
    with pytest.raises(ValueError, match="expected 4"):
        layer.refresh()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_second_plane_and_turns_lower_the_objective(share: float, seed: int) -> None:
    T, H = problem(24, 40, seed)
    values = [objective_value(RowColumnSolver().solve(T, H), T, H)]
    for turns in (0, 1, 2):
        values.append(objective_value(SalientSolver(share=share, turns=turns).solve(T, H), T, H))
    assert values[1] < values[0]
    assert values[2] <= values[1] * (1 + 1e-4)
    assert values[3] <= values[2] * (1 + 1e-4)


def test_the_columns_with_the_largest_gain_are_chosen() -> None:
    """Brute force: the gain of one column with one size for all rows, by trying sizes."""
    T, H = problem(6, 8)
    R = T - RowColumnSolver().solve(T, H).dense()
    G = R @ H
    f = float(((R @ H) * R).sum())
    gains = []
    for j in range(8):
        best = 0.0
        for a in torch.linspace(0, 4 * float(R.abs().max()), 400):
            E = torch.zeros_like(R)
            E[:, j] = a * torch.where(G[:, j] >= 0, 1.0, -1.0)
            best = max(best, f - float((((R - E) @ H) * (R - E)).sum()))
        gains.append(best)
    order = torch.tensor(gains).argsort(descending=True)
    assert set(choose_columns(G, H, 3).tolist()) == set(order[:3].tolist())


@settings(deadline=None, max_examples=60)
@given(N=st.integers(1, 40), K=st.integers(1, 70), bits=st.floats(1.0, 40.0))
def test_most_columns_is_the_most_that_fits(N: int, K: int, bits: float) -> None:
    fits = [k for k in range(K + 1) if stored_bits(N, K, k) <= bits * N * K]
    if not fits or 0 not in fits:
        with pytest.raises(LitBinqError, match=r"closed_form\.bits"):
            most_columns(N, K, bits)
    else:
        assert most_columns(N, K, bits) == max(fits)


@pytest.mark.parametrize("bits", [1.4, 1.6, 2.0, 3.0])
def test_a_budget_is_kept_and_spent_where_it_gains(bits: float) -> None:
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(96, 128, generator=g) for name in ("even", "peaked", "other")}
    moments = {name: torch.ones(128) for name in weights}
    moments["peaked"][:16] = 1000.0  # a few columns make nearly all of this layer's output
    spent = SalientSolver().spend(weights, moments, bits)
    mean = sum(spent.values()) / 3
    assert mean <= bits
    if bits < 2:
        assert spent["peaked"] > spent["even"] or bits > 1.5
        assert mean > bits - 0.15  # nearly all is spent
    T, H = problem(96, 128)
    for value in spent.values():
        assert SalientSolver().solve(T, H, bits=value).pack().true_bits() <= value + 1e-9


def test_a_budget_below_the_signs_is_refused() -> None:
    weights, moments = {"a": torch.randn(8, 16)}, {"a": torch.ones(16)}
    with pytest.raises(LitBinqError, match="expected at least"):
        SalientSolver().spend(weights, moments, 1.0)


@pytest.mark.parametrize("wrong", [{"share": -0.1}, {"share": 1.1}, {"turns": -1}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LitBinqError, match=r"solver\."):
        SalientSolver(**wrong)


def test_no_share_is_the_plain_format() -> None:
    T, H = problem(8, 16)
    assert isinstance(SalientSolver(share=0.0).solve(T, H), RowColumn)
    assert isinstance(SalientSolver(share=1.0).solve(T, H).pack(), SalientLinear)
