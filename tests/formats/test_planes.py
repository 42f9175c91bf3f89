"""The planes format: counted bits, exact reload, ordered latents; its solver and the spending of a budget."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import Planes, PlanesLinear, RowColumn, planes_matmul
from lit_binq.formats.planes import stored_bits
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.solvers import PlanesSolver, Problem, RowColumnSolver, objective_value
from lit_binq.solvers.planes import most_columns, update_codes, update_scales
from lit_binq.solvers.planes_init import GAUSSIAN, begin, column_gains, feedback_codes, start_scales
from lit_binq.solvers.row_column import start


def plane(N: int, K: int, g: torch.Generator, size: float = 1.0) -> RowColumn:
    r, c = ((torch.rand(n, generator=g) + 0.1).half().float() for n in (N, K))
    return RowColumn(size * r, c, torch.randint(2, (N, K), generator=g).float() * 2 - 1)


def several(N: int, K: int, counts: tuple[int, ...], seed: int = 0) -> Planes:
    g = torch.Generator().manual_seed(seed)
    sets = [torch.arange(K)]
    for k in counts:
        sets.append(sets[-1][torch.randperm(len(sets[-1]), generator=g)[:k]].sort().values)
    return Planes([plane(N, len(s), g, 0.5**p) for p, s in enumerate(sets)], sets[1:])


def problem(N: int, K: int, seed: int = 0, tokens: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, K, generator=g) * torch.logspace(-1, 1, K)[torch.randperm(K, generator=g)]
    return torch.randn(N, K, generator=g), X.T @ X / tokens + 0.01 * torch.eye(K)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    N, K = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    counts = sorted(draw(st.lists(st.integers(1, K), min_size=1, max_size=3)), reverse=True)
    return N, K, tuple(counts)


@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 100), bias=st.booleans())
def test_stored_and_loaded_bit_for_bit(shape: tuple[int, int, tuple[int, ...]], seed: int, bias: bool) -> None:
    N, K, counts = shape
    s = several(N, K, counts, seed)
    layer = s.pack(torch.randn(N) if bias else None)
    assert torch.equal(layer.dequantize(), s.dense())
    counted = sum(t.numel() * t.element_size() * 8 for t in layer.state_dict().values())
    assert layer.stored_bits() == stored_bits(N, K, counts) == counted - 32 * N * bias
    linear = nn.Linear(K, N, bias=bias)
    again = empty_layer(linear, describe_layer(layer))
    again.load_state_dict(layer.state_dict())
    again.refresh()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again(x), layer(x))
    for mine, theirs in zip(again.solution().columns, s.columns, strict=True):
        assert torch.equal(mine, theirs)
    reference = x.double() @ s.dense().double().T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(layer(x).double(), reference, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 100), bias=st.booleans())
def test_one_operator_multiplies_by_all_planes(shape: tuple[int, int, tuple[int, ...]], seed: int, bias: bool) -> None:
    """In float64 nothing but the stored values decides; narrower inputs keep their dtype."""
    N, K, counts = shape
    s = several(N, K, counts, seed)
    layer = s.pack(torch.randn(N) if bias else None)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reference = x @ s.dense().double().T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(layer(x), reference, rtol=1e-6, atol=1e-5)  # `dense` is float32
    for dtype in (torch.float32, torch.bfloat16):
        assert layer(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("counts", [(11,), (11, 7), (6, 6, 1)])
def test_the_custom_operator_is_well_formed(counts: tuple[int, ...]) -> None:
    layer = several(5, 11, counts).pack(torch.ones(5))
    planes = range(1 + len(counts))
    stored = [[layer.get_buffer(f"{name}{p}") for p in planes] for name in ("codes", "row_scale", "col_scale")]
    columns = [layer.get_buffer(f"columns{p}") for p in range(1, 1 + len(counts))]
    torch.library.opcheck(
        planes_matmul,
        (torch.randn(2, 11), *stored, columns, layer.bias, [11, *counts]),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_tracing_passes_a_layer_once() -> None:
    program = torch.export.export(several(5, 11, (11, 7)).pack(torch.ones(5)), (torch.randn(2, 11),))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.lit_binq.planes_matmul.default]


def test_the_smaller_planes_survive_half_precision() -> None:
    """Their sum is rounded once. Planes that cancel but for 2^-11 show it."""
    one = torch.ones(1)
    stack = [RowColumn(one, one, torch.ones(1, 1)), RowColumn(one * (1 - 2.0**-11), one, -torch.ones(1, 1))]
    layer = Planes(stack, [torch.tensor([0])]).pack()
    assert float(layer(torch.ones(1, 1, dtype=torch.bfloat16))) == 2.0**-11


@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 100), codes=st.booleans(), target=st.booleans())
def test_latents_stand_for_the_stored_codes(
    shape: tuple[int, int, tuple[int, ...]], seed: int, codes: bool, target: bool
) -> None:
    s = several(*shape, seed)
    layer = s.pack()
    latent = layer.latent(codes, torch.randn(shape[:2]) if target else None)
    assert torch.equal(latent.pack().dequantize(), layer.dequantize())
    x = torch.randn(4, shape[1])
    torch.testing.assert_close(latent(x), layer(x), rtol=1e-4, atol=1e-4)
    assert bool(latent.code_parameters()) == codes


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_a_pushed_latent_passes_the_levels_in_order(planes: int) -> None:
    """From the lowest to the highest weight: never past a level that lies between."""
    one = torch.ones(1)
    stack = [RowColumn(one * 0.5**p, one, -torch.ones(1, 1)) for p in range(planes)]
    solution = Planes(stack, [torch.tensor([0])] * (planes - 1))
    latent = solution.pack().latent(True)
    levels = []
    for _ in range(500):
        levels.append(float(latent.solution().dense()))
        (-latent(torch.ones(1, 1)).sum()).backward()
        with torch.no_grad():
            latent.v -= 0.01 * latent.v.grad
        latent.v.grad = None
    step = 0.5 ** (planes - 1)
    top = 2 - step
    assert list(dict.fromkeys(levels)) == [-top + 2 * step * i for i in range(2**planes)]


def test_contradictory_bitmaps_are_refused() -> None:
    layer = several(3, 10, (4,)).pack()
    layer.column_bits1[0] ^= 1
    with pytest.raises(ValueError, match="expected 4"):
        layer.refresh()


@pytest.mark.parametrize("counts", [(0,), (5,), (3, 4)])
def test_impossible_counts_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not rise"):
        PlanesLinear(4, 2, **{f"columns{p}": k for p, k in enumerate(counts, 1)})


@pytest.mark.parametrize("shares", [[0.1], [0.5, 0.2], [1.0], [1.0, 1.0]])
@pytest.mark.parametrize("seed", range(2))
def test_further_planes_and_turns_lower_the_objective(shares: list[float], seed: int) -> None:
    T, H = problem(24, 40, seed)
    values = [objective_value(RowColumnSolver().solve(Problem(T, H)), T, H)]
    for rounds in (1, 2, 3):
        values.append(objective_value(PlanesSolver(shares=shares, rounds=rounds).solve(Problem(T, H)), T, H))
    assert values[1] < values[0]
    assert values[2] <= values[1] * (1 + 1e-4)
    assert values[3] <= values[2] * (1 + 1e-4)


@pytest.mark.parametrize("counts", [(9,), (20,), (20, 20), (20, 11, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_no_update_raises_the_objective(counts: tuple[int, ...], seed: int) -> None:
    """From any scales, also such whose levels lie in an odd order."""
    T, H = problem(16, 20, seed)
    s = several(16, 20, counts, seed)
    f = objective_value(s, T, H)
    for _ in range(3):
        for update in (update_codes, update_scales):
            s = update(s, T @ H, H)
            value = objective_value(s, T, H)
            assert value <= f * (1 + 1e-5)
            f = value


@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (3, 7), (4, 64)])
def test_blocks_do_not_matter(inner: int, outer: int) -> None:
    T, H = problem(16, 20)
    s = several(16, 20, (20, 11))
    one, other = update_codes(s, T @ H, H, sweeps=2), update_codes(s, T @ H, H, sweeps=2, inner=inner, outer=outer)
    torch.testing.assert_close(one.dense(), other.dense())


def test_codes_end_where_no_single_weight_can_do_better() -> None:
    """Brute force over all levels of every single weight, scales of falling size."""
    T, H = problem(5, 8)
    s = PlanesSolver(shares=[1.0, 1.0]).solve(Problem(T, H))
    s = update_codes(s, T @ H, H, sweeps=40)
    f = objective_value(s, T, H)
    sizes = [plane.r[:, None] * plane.c[None, :] for plane in s.planes]
    falling = (sizes[0].abs() >= sizes[1].abs() + sizes[2].abs()) & (sizes[1].abs() >= sizes[2].abs())
    W = s.dense()
    for i, j in falling.nonzero().tolist():
        for signs in itertools.product((-1, 1), repeat=3):
            V = W.clone()
            V[i, j] = sum(sign * float(size[i, j]) for sign, size in zip(signs, sizes, strict=True))
            assert float((((T - V) @ H) * (T - V)).sum()) >= f * (1 - 1e-5)


def test_each_plane_is_worth_its_bits() -> None:
    """On a Gaussian weight and white inputs every plane takes about two thirds of the error that is left."""
    T, H = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)), torch.eye(128)
    values = [objective_value(PlanesSolver(shares=[1.0] * p).solve(Problem(T, H)), T, H) for p in range(4)]
    for worse, better in itertools.pairwise(values):
        assert better < 0.36 * worse


def test_the_columns_with_the_largest_gain_are_chosen() -> None:
    """Brute force: the gain of one column with one size for all rows, by trying sizes."""
    T, H = problem(6, 8)
    R = T - RowColumnSolver(rounds=1).solve(Problem(T, H)).dense()
    f = float(((R @ H) * R).sum())
    gains = []
    for j in range(8):
        best = 0.0
        for a in torch.linspace(0, 4 * float(R.abs().max()), 400):
            E = torch.zeros_like(R)
            E[:, j] = a * torch.where((R @ H)[:, j] >= 0, 1.0, -1.0)
            best = max(best, f - float((((R - E) @ H) * (R - E)).sum()))
        gains.append(best)
    order = torch.tensor(gains).argsort(descending=True)
    assert set(column_gains(R @ H, H.diagonal()).topk(3).indices.tolist()) == set(order[:3].tolist())
    solution = PlanesSolver(shares=[3 / 8]).solve(Problem(T, H))
    assert set(solution.columns[0].tolist()) == set(order[:3].tolist())


@settings(deadline=None, max_examples=60)
@given(N=st.integers(1, 20), K=st.integers(1, 30), bits=st.floats(1.0, 40.0))
def test_most_columns_is_the_most_that_fits(N: int, K: int, bits: float) -> None:
    def fits(counts: list[int]) -> bool:
        return stored_bits(N, K, counts) <= bits * N * K

    if not fits([]):
        with pytest.raises(LitBinqError, match=r"closed_form\.bits"):
            most_columns(N, K, bits)
        return
    counts = most_columns(N, K, bits)
    assert fits(counts)
    assert len(counts) <= 3
    for p in range(3):  # each plane is as large as it may be, those before it being so
        if p > len(counts) or (p and counts[p - 1] < K):
            break
        most = counts[p - 1] if p else K
        best = max((k for k in range(1, most + 1) if fits([*counts[:p], k])), default=0)
        assert (counts[p] if p < len(counts) else 0) == best


@pytest.mark.parametrize("bits", [1.4, 1.6, 2.0, 2.6, 3.3])
def test_a_budget_is_kept_and_spent_where_it_gains(bits: float) -> None:
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(96, 128, generator=g) for name in ("even", "peaked", "other")}
    moments = {name: torch.ones(128) for name in weights}
    moments["peaked"][:16] = 1000.0  # a few columns make nearly all of this layer's output
    spent = PlanesSolver().allocate_bits(weights, moments, bits)
    mean = sum(spent.values()) / 3
    assert bits - 0.15 < mean <= bits  # nearly all is spent
    if bits < 1.5:
        assert spent["peaked"] > spent["even"]
    T, H = problem(96, 128)
    for value in spent.values():
        assert PlanesSolver(rounds=0).solve(Problem(T, H, bits=value)).pack().true_bits() <= value + 1e-9


def test_a_budget_below_the_signs_is_refused() -> None:
    weights, moments = {"a": torch.randn(8, 16)}, {"a": torch.ones(16)}
    with pytest.raises(LitBinqError, match="expected at least"):
        PlanesSolver().allocate_bits(weights, moments, 1.0)


@pytest.mark.parametrize(
    "wrong", [{"shares": [-0.1]}, {"shares": [1.1]}, {"shares": [0.1, 0.2]}, {"shares": [1.0] * 4}, {"rounds": -1}]
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LitBinqError, match=r"solver\."):
        PlanesSolver(**wrong)


def test_no_share_is_the_plain_format() -> None:
    T, H = problem(8, 16)
    assert isinstance(PlanesSolver(shares=[0.0]).solve(Problem(T, H)), RowColumn)
    assert isinstance(PlanesSolver(shares=[]).solve(Problem(T, H)), RowColumn)
    assert isinstance(PlanesSolver(shares=[1.0, 0.0]).solve(Problem(T, H)).pack(), PlanesLinear)


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_the_start_is_better_with_each_of_its_parts(planes: int) -> None:
    """A few large weights in the columns that matter: stretched scales keep them, feedback spreads what is left."""
    torch.manual_seed(0)
    T = torch.randn(48, 64)
    T[::3, 5] *= 8
    X = torch.randn(200, 64) @ torch.randn(64, 64) * torch.linspace(0.2, 2, 64)
    X[:, 5] *= 4
    H = X.T @ X / 200
    sets = [torch.arange(64)] * planes

    def error(W: Tensor) -> float:
        return float((((T - W) @ H) * (T - W)).sum())

    stretched = start_scales(T, H.diagonal(), sets)
    one = start(T, 10)
    unstretched = Planes([RowColumn(one.r, one.c * f, one.B) for f in GAUSSIAN[planes - 1]], stretched.columns)
    plain = Planes(
        [
            RowColumn(p.r, p.c, torch.where(signs >= 0, 1.0, -1.0))
            for p, signs in zip(stretched.planes, signs_of(T, stretched), strict=True)
        ],
        stretched.columns,
    )
    fed = feedback_codes(stretched, T, H)
    assert error(fed.dense()) < 0.7 * error(plain.dense())
    assert error(fed.dense()) < error(feedback_codes(unstretched, T, H).dense())
    assert torch.equal(begin(T, H, [64] * (planes - 1)).dense(), fed.dense())


def signs_of(T: Tensor, s: Planes) -> list[Tensor]:
    """Signs one after the other: the nearest level of scales that fall by half."""
    signs, rest = [], T
    for plane in s.planes:
        size = plane.r[:, None] * plane.c
        signs.append(torch.where(rest >= 0, 1.0, -1.0))
        rest = rest - size * signs[-1]
    return signs


def test_a_start_of_zeros_and_of_one_column() -> None:
    for T in (torch.zeros(3, 8), torch.full((3, 1), -2.0)):
        K = T.shape[1]
        solution = PlanesSolver(shares=[1.0]).solve(Problem(T, torch.eye(K)))
        torch.testing.assert_close(solution.dense(), T)
