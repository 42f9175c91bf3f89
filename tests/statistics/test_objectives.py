"""Objectives: the pair (T, H) stands for exactly the token error it claims, whatever the activations are like."""

import logging
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.statistics.objectives import OBJECTIVES, GramAccumulator, Statistics, target_and_metric

N, K, TOKENS = 5, 7, 40


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_streams(tokens: int = TOKENS, features: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x with correlated columns, x~ that drifted away from it."""
    x = normal(tokens, features, seed=seed) @ normal(features, features, seed=seed + 1)
    return x, 0.8 * x + 0.4 * normal(tokens, features, seed=seed + 2)


def gather(x: Tensor, x_tilde: Tensor, objective: str, weights: Tensor | None = None) -> Statistics | None:
    if objective == "weight":
        return None
    grams = GramAccumulator(x.shape[-1], torch.device("cpu"), objective)
    grams.add(x, x_tilde, weights)
    return grams.statistics()


def value(T: Tensor, H: Tensor, W_hat: Tensor) -> float:
    """tr((T - W^) H (T - W^)^T)."""
    R = (T - W_hat).double()
    return float(torch.trace(R @ H.double() @ R.T))


def token_error(
    objective: str, W: Tensor, W_hat: Tensor, streams: tuple[Tensor, Tensor], shrinkage: float, weights: list[float]
) -> float:
    """What the objective claims to measure, token by token, plus the pull towards W."""
    W, W_hat, x, x_tilde = (t.double() for t in (W, W_hat, *streams))
    distance = float((W - W_hat).square().sum())
    if objective == "weight":
        return distance
    wanted = {"naive_output": x, "pseudo_target": x_tilde, "true_target": x}[objective]
    given_ = x if objective == "naive_output" else x_tilde
    error = power = 0.0
    for t in range(len(x)):
        error += weights[t] * float((W @ wanted[t] - W_hat @ given_[t]).square().sum()) / len(x)
        power += weights[t] * float(given_[t].square().mean()) / len(x)
    return error + shrinkage * power * distance


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_quadratic_form_is_the_mean_token_error(objective: str, shrinkage: float, weighted: bool) -> None:
    streams, W = two_streams(), normal(N, K, seed=10)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)) * 2 if weighted else None
    T, H = target_and_metric(W, gather(*streams, objective, weights), objective=objective, shrinkage=shrinkage)
    assert T.dtype == H.dtype == torch.float32
    assert T.shape == W.shape
    assert H.shape == (K, K)
    listed = [1.0] * TOKENS if weights is None else weights.tolist()
    candidates = [W, torch.zeros_like(W), T] + [W + normal(N, K, seed=s) for s in (20, 21, 22)]
    f = [value(T, H, W_hat) for W_hat in candidates]
    claimed = [token_error(objective, W, W_hat, streams, shrinkage, listed) for W_hat in candidates]
    scale = max(map(abs, claimed))
    for i in range(1, len(candidates)):
        assert f[i] - f[0] == pytest.approx(claimed[i] - claimed[0], abs=2e-6 * scale)
    if objective != "true_target":  # nothing is left over: there W itself is perfect
        assert f == pytest.approx(claimed, abs=2e-6 * scale)
        assert torch.equal(T, W)


def test_the_unshrunk_true_target_is_the_regression_of_the_full_precision_output() -> None:
    (x, x_tilde), W = two_streams(), normal(N, K, seed=10)
    T, _ = target_and_metric(W, gather(x, x_tilde, "true_target"), objective="true_target", shrinkage=0.0)
    regression = torch.linalg.lstsq(x_tilde.double(), x.double() @ W.double().T).solution.T
    torch.testing.assert_close(T.double(), regression, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(T, W, atol=1e-2)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 10.0])
def test_where_the_streams_agree_the_true_target_is_the_weight(shrinkage: float) -> None:
    (x, _), W = two_streams(), normal(N, K, seed=10)
    T, H = target_and_metric(W, gather(x, x, "true_target"), objective="true_target", shrinkage=shrinkage)
    torch.testing.assert_close(T, W, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        H, target_and_metric(W, gather(x, x, "pseudo_target"), objective="pseudo_target", shrinkage=shrinkage)[1]
    )


def test_much_shrinkage_ends_at_the_weight() -> None:
    (x, x_tilde), W = two_streams(), normal(N, K, seed=10)
    distances = []
    for shrinkage in (0.0, 0.1, 10.0, 1e3, 1e6):  # more than the damping's own limit, too
        T, _ = target_and_metric(W, gather(x, x_tilde, "true_target"), objective="true_target", shrinkage=shrinkage)
        distances.append(float((T - W).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4 < distances[0]


# ---- accumulation --------------------------------------------------------------------------------------------------


def test_batches_and_shapes_do_not_matter() -> None:
    x, x_tilde = two_streams()
    whole = gather(x, x_tilde, "true_target")
    grams = GramAccumulator(K, torch.device("cpu"), "true_target")
    grams.add(x[:10].reshape(2, 5, K), x_tilde[:10].reshape(2, 5, K))
    grams.add(x[10:11], x_tilde[10:11])
    grams.add(x[11:], x_tilde[11:])
    parts = grams.statistics()
    assert whole is not None
    assert parts.tokens == whole.tokens == TOKENS
    torch.testing.assert_close(parts.S, whole.S)
    torch.testing.assert_close(parts.C, whole.C)
    torch.testing.assert_close(whole.C, x.T @ x_tilde / TOKENS)  # which side is which


def test_a_weight_of_two_is_a_token_seen_twice() -> None:
    x, x_tilde = two_streams()
    weights = torch.tensor([0, 1, 2, 3]).repeat(TOKENS // 4)
    weighted = gather(x, x_tilde, "true_target", weights.float())
    repeated = gather(x.repeat_interleave(weights, 0), x_tilde.repeat_interleave(weights, 0), "true_target")
    assert weighted is not None
    assert repeated is not None
    assert weighted.tokens == TOKENS  # an average over tokens, not over weights
    for name in ("S", "C"):
        torch.testing.assert_close(
            getattr(weighted, name) * weighted.tokens, getattr(repeated, name) * repeated.tokens, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    ("objective", "needed"), [("weight", ""), ("naive_output", "F"), ("pseudo_target", "S"), ("true_target", "SC")]
)
def test_only_the_grams_an_objective_needs_are_computed(objective: str, needed: str) -> None:
    grams = GramAccumulator(K, torch.device("cpu"), objective)
    grams.add(*two_streams())
    assert {n for n in "SCF" if float(getattr(grams, n).abs().max()) > 0} == set(needed)


def test_half_precision_activations_are_summed_in_float32() -> None:
    x, x_tilde = (t.bfloat16() for t in two_streams())
    stats = gather(x, x_tilde, "true_target")
    assert stats is not None
    assert stats.S.dtype == torch.float32
    torch.testing.assert_close(stats.S, x_tilde.float().T @ x_tilde.float() / TOKENS)


# ---- singular Grams ------------------------------------------------------------------------------------------------


def singular(kind: str) -> tuple[Tensor, Tensor]:
    x, x_tilde = two_streams()
    if kind == "dead":
        x[:, 2], x_tilde[:, 2], x_tilde[:, 4] = 0, 0, 0
    elif kind == "collinear":
        x_tilde[:, 3] = 2 * x_tilde[:, 0] - x_tilde[:, 1]
    elif kind == "few tokens":
        x, x_tilde = x[:3], x_tilde[:3]
    elif kind == "one token":
        x, x_tilde = x[:1], x_tilde[:1]
    return x, x_tilde


@pytest.mark.parametrize("objective", ["pseudo_target", "true_target"])
@pytest.mark.parametrize("kind", ["dead", "collinear", "few tokens", "one token"])
def test_a_singular_gram_is_damped_and_the_log_says_so(
    kind: str, objective: str, caplog: pytest.LogCaptureFixture
) -> None:
    (x, x_tilde), W = singular(kind), normal(N, K, seed=10)
    stats = gather(x, x_tilde, objective)
    assert stats is not None
    with caplog.at_level(logging.WARNING, "lit_binq.statistics.objectives"):
        target_and_metric(W, stats, objective=objective, shrinkage=0.1)
        assert not caplog.records
        T, H = target_and_metric(W, stats, objective=objective, shrinkage=0.0)
    assert "shrinkage raised from 0 to" in caplog.text
    assert torch.isfinite(T).all()
    damping = float((H - stats.S).diagonal().mean())
    mean = float(stats.S.diagonal().mean())
    assert 0 < damping < 1e-3 * mean  # as little as will do
    torch.testing.assert_close(H, stats.S + damping * torch.eye(K))
    assert float(torch.linalg.eigvalsh(H.double()).min()) > 0
    if objective == "true_target":  # the normal equations, hence still the minimum of what it claims
        right = W.double() @ (stats.C.double() + damping * torch.eye(K))
        torch.testing.assert_close(T.double() @ H.double(), right, atol=1e-4, rtol=1e-4)
        if kind == "dead":  # an input that is dead in both streams says nothing: the weight stays
            torch.testing.assert_close(T[:, 2], W[:, 2])
            assert float(T[:, 4].abs().max()) < 1e9


def test_an_indefinite_gram_is_refused_in_one_line() -> None:
    S = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(LitBinqError, match=r"no shrinkage from 0\.5 to 1000 made it positive definite") as caught:
        target_and_metric(torch.ones(1, 2), Statistics(S, S, S, 1), objective="true_target", shrinkage=0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_input_leaves_the_weight(objective: str) -> None:
    zero, W = torch.zeros(TOKENS, K), normal(N, K, seed=10)
    T, H = target_and_metric(W, gather(zero, zero, objective), objective=objective, shrinkage=0.1)
    assert torch.equal(T, W)
    assert torch.equal(H, torch.eye(K))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "bad"), [(s, float(v)) for s in (0, 1) for v in ("nan", "inf", "-inf")] + [(1, 1e25)]
)
def test_activations_that_are_not_finite_are_refused(stream: int, bad: float) -> None:
    streams = two_streams()
    streams[stream][5, 2] = bad
    with pytest.raises(LitBinqError, match="activations hold NaN or inf") as caught:
        gather(*streams, "true_target")
    assert "\n" not in str(caught.value)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(LitBinqError, match="got no calibration tokens"):
        GramAccumulator(K, torch.device("cpu"), "true_target").statistics()
    with pytest.raises(LitBinqError, match="got no calibration tokens"):
        gather(torch.zeros(0, K), torch.zeros(0, K), "true_target")


@pytest.mark.parametrize("shrinkage", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bad_shrinkage_is_refused(objective: str, shrinkage: float) -> None:
    stats = gather(*two_streams(), objective)
    with pytest.raises(LitBinqError, match="shrinkage: got"):
        target_and_metric(torch.ones(N, K), stats, objective=objective, shrinkage=shrinkage)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(LitBinqError, match="'best', expected one of weight, naive_output, pseudo_target, true_target"):
        target_and_metric(torch.ones(N, K), None, objective="best", shrinkage=0.1)  # type: ignore[arg-type]  # the point of the test


# ---- extremes ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 30),
    features=st.integers(1, 12),
    powers=st.tuples(*[st.integers(-8, 8)] * 3),
    spread=st.floats(0, 4),
    shrinkage=st.sampled_from([0.0, 1e-6, 0.1, 1e3]),
    objective=st.sampled_from(OBJECTIVES[1:]),
)
def test_extreme_scales(
    seed: int,
    tokens: int,
    features: int,
    powers: tuple[int, int, int],
    spread: float,
    shrinkage: float,
    objective: str,
) -> None:
    """Whatever the scales of x, x~, W and of single channels: finite, positive definite, normal equations hold."""
    x, x_tilde = two_streams(tokens, features, seed)
    channels = torch.exp(spread * normal(features, seed=seed + 5))
    x, x_tilde = x * channels * 10.0 ** powers[0], x_tilde * channels * 10.0 ** powers[1]
    W = normal(3, features, seed=seed + 6) * 10.0 ** powers[2]
    stats = gather(x, x_tilde, objective)
    assert stats is not None
    T, H = target_and_metric(W, stats, objective=objective, shrinkage=shrinkage)
    assert torch.isfinite(T).all()
    assert torch.isfinite(H).all()
    # Diagonal scaling takes the channels' spread out; what is left must be positive definite up to float32 rounding.
    root = H.double().diagonal().rsqrt()
    assert float(torch.linalg.eigvalsh(root[:, None] * H.double() * root).min()) > -1e-6
    if objective == "true_target":
        damping = float((H.double() - stats.S.double()).diagonal().min())
        right = W.double() @ stats.C.double() + damping * W.double()
        error = (T.double() @ H.double() - right).norm()
        assert float(error) <= 1e-5 * float((T.double().norm() + W.double().norm()) * H.double().norm() + right.norm())
    else:
        assert torch.equal(T, W)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    power=st.integers(-26, 26),
    tokens=st.sampled_from([3, 40]),
    objective=st.sampled_from(OBJECTIVES[1:]),
    shrinkage=st.sampled_from([0.0, 0.1]),
)
def test_the_unit_of_the_activations_does_not_matter(
    seed: int, power: int, tokens: int, objective: str, shrinkage: float
) -> None:
    """Activations times 2^p: the same target, the metric times 4^p, bit for bit, singular Grams included."""
    x, x_tilde = two_streams(tokens, K, seed)
    W = normal(N, K, seed=seed + 6)
    T, H = target_and_metric(W, gather(x, x_tilde, objective), objective=objective, shrinkage=shrinkage)
    stats = gather(x * 2.0**power, x_tilde * 2.0**power, objective)
    scaled_T, scaled_H = target_and_metric(W, stats, objective=objective, shrinkage=shrinkage)
    assert torch.equal(scaled_T, T)
    assert torch.equal(scaled_H, H * 4.0**power)


# ---- several ranks -------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    """One of two processes; what it finds goes to a file, failures too."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    x, x_tilde = two_streams()
    found: dict[str, object] = {}
    for case, shares in {"uneven": (25, 40), "one rank without tokens": (40, 40), "nan": (25, 40)}.items():
        mine = slice(0, shares[0]) if rank == 0 else slice(shares[0], shares[1])
        grams = GramAccumulator(K, torch.device("cpu"), "true_target")
        grams.add(x[mine], x_tilde[mine])
        if case == "nan" and rank == 1:
            grams.add(torch.full((1, K), float("nan")), torch.ones(1, K))
        try:
            stats = grams.statistics()
            found[case] = (stats.S, stats.C, stats.F, stats.tokens)
        except LitBinqError as error:
            found[case] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":  # no name lookup of this host, which may have no network
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)]
    one = gather(*two_streams(), "true_target")
    assert one is not None
    for found in ranks:
        for case in ("uneven", "one rank without tokens"):
            S, C, F, tokens = found[case]
            assert tokens == one.tokens == TOKENS
            torch.testing.assert_close((S, C, F), (one.S, one.C, one.F))
        assert "activations hold NaN or inf" in found["nan"]  # also on the rank whose own tokens are sound
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["uneven"][:3], ranks[1]["uneven"][:3], strict=True))
