"""The formats levels, row mean and sparse 8-bit: what is stored is what is computed with, in all three states."""

import json

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import (
    FORMATS,
    Levels,
    LevelsLinear,
    PackedLinear,
    RowMean,
    RowMeanLinear,
    Solution,
    Sparse8,
    Sparse8Linear,
    levels_matmul,
    packed_width,
    sparse8_matmul,
)
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.blocks import replace_module

KINDS = ("levels", "two zones", "scaled", "row_mean", "sparse8")


def half(t: Tensor) -> Tensor:
    """Values that float16 holds, so that packing rounds nothing."""
    return t.half().float()


def random_solution(kind: str, N: int, K: int, seed: int = 0, group: int = 8) -> Solution:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return half(torch.randn(*shape, generator=g))

    B = torch.randint(2, (N, K), generator=g).float() * 2 - 1
    if kind == "row_mean":
        return RowMean(normal(N), normal(N), B)
    if kind == "sparse8":
        mask = torch.rand(N, K, generator=g) < 0.3
        Q = torch.randint(-127, 128, (N, K), generator=g).float() * mask
        return Sparse8(normal(N), B, normal(N), Q, mask)
    zones = 1 if kind == "levels" else 2
    salient = torch.rand(K, generator=g) < 0.4 if zones == 2 else None
    c = 2.0 ** torch.randint(-3, 3, (K,), generator=g) if kind == "scaled" else None
    codes = torch.randint(4, (N, K), generator=g).to(torch.uint8)
    return Levels(normal(N, zones * -(-K // group), 4), codes, group, salient, c)


def plain_levels(s: Levels) -> Tensor:
    """The dense weight, element by element from the format's definition."""
    W = torch.zeros(s.codes.shape)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            group = j // s.group if s.salient is None else 2 * (j // s.group) + int(s.salient[j])
            W[i, j] = s.levels[i, group, int(s.codes[i, j])] * (1 if s.c is None else s.c[j])
    return W


sizes = st.integers(1, 21)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), N=sizes, K=sizes, group=st.integers(1, 24), seed=st.integers(0, 999))
def test_three_states_of_one_weight(kind: str, N: int, K: int, group: int, seed: int) -> None:
    s = random_solution(kind, N, K, seed, group)
    bias = torch.randn(N) if seed % 2 else None
    layer = s.pack(bias)
    W = s.dense()
    assert torch.equal(layer.dequantize(), W)
    if isinstance(s, Levels):
        assert torch.equal(W, plain_levels(s))
    x = torch.randn(2, 3, K, dtype=torch.float64)
    expected = nn.functional.linear(x, W.double(), None if bias is None else bias.double())
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert layer(x.float()).dtype == torch.float32
    for train in (False, True):
        latent = layer.latent(train, torch.randn(N, K))
        torch.testing.assert_close(latent.double()(x), expected, rtol=1e-6, atol=1e-6)
        again = latent.float().pack()
        assert torch.equal(again.dequantize(), W)
        assert all(torch.equal(t, again.weight_buffers()[n]) for n, t in layer.weight_buffers().items())


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), N=sizes, K=sizes, seed=st.integers(0, 999))
def test_true_bits_count_every_stored_byte_and_reload_is_exact(kind: str, N: int, K: int, seed: int) -> None:
    linear = nn.Linear(K, N)
    layer = random_solution(kind, N, K, seed).pack(linear.bias.detach())
    state = layer.state_dict()
    stored = sum(t.numel() * t.element_size() for name, t in state.items() if name != "bias")
    assert layer.stored_bits() == 8 * stored
    assert set(layer.weight_buffers()) == state.keys() - {"bias"}
    empty = empty_layer(linear, json.loads(json.dumps(describe_layer(layer))))
    assert type(empty) is type(layer)
    empty.load_state_dict(state)
    empty.refresh()
    x = torch.randn(4, K)
    assert torch.equal(empty(x), layer(x))
    kept = {t.data_ptr() for t in [*layer.weight_buffers().values(), layer.bias]}
    for _, operands in layer.operands():
        assert operands[0].data_ptr() in kept


def test_sizes_are_the_formulas() -> None:
    N, K = 256, 1024
    assert LevelsLinear(K, N, 128).true_bits() == 2.5
    assert LevelsLinear(K, N, 128, zones=2).true_bits() == 3 + 1 / N
    assert LevelsLinear(K, N, 128, zones=2, scaled=1).true_bits() == 3 + 17 / N
    assert RowMeanLinear(K, N).true_bits() == 1 + 32 / K
    assert Sparse8Linear(K, N, N * K // 10).true_bits() == pytest.approx(2.8 + 32 / K, abs=1e-4)
    assert LevelsLinear(9, 3, 4).stored_bits() == 8 * 2 * 3 * packed_width(9) + 16 * 3 * 3 * 4


@pytest.mark.parametrize(
    ("kind", "name", "buffers"),
    [
        ("levels", "LevelsMatMul", ["codes", "selector", "levels", "column_bits"]),
        ("scaled", "LevelsMatMul", ["codes", "selector", "levels", "column_bits"]),
        ("row_mean", "BinaryMatMul", ["codes", "row_scale", "ones"]),
        ("sparse8", "Sparse8MatMul", ["codes", "mask", "values", "row_scale", "value_scale"]),
    ],
)
def test_operands_are_the_tensors_that_a_node_reads(kind: str, name: str, buffers: list[str]) -> None:
    for bias in (None, torch.ones(5)):
        layer = random_solution(kind, 5, 12).pack(bias)
        ((op, operands),) = layer.operands()
        wanted = [*buffers, *(["bias"] if bias is not None else [])]
        assert op == name
        assert all(a is getattr(layer, b) for a, b in zip(operands, wanted, strict=True))
    assert len(random_solution("levels", 5, 12).pack().column_bits) == 0
    assert "ones" not in RowMeanLinear(4, 3).state_dict()


def test_custom_operators_are_well_formed() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x = torch.randn(2, 11)
    for kind in ("levels", "two zones"):
        layer = random_solution(kind, 5, 11).pack(torch.ones(5))
        assert isinstance(layer, LevelsLinear)
        buffers = (layer.codes, layer.selector, layer.levels, layer.column_bits, layer.bias)
        torch.library.opcheck(levels_matmul, (x, *buffers, 11, 8, layer.zones), test_utils=tests)
    sparse = random_solution("sparse8", 5, 11).pack()
    arguments = (x, *sparse.weight_buffers().values(), None, 11)
    torch.library.opcheck(sparse8_matmul, arguments, test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_latent_are_those_of_the_dense_weight(kind: str) -> None:
    """Each scale's by finite differences; each sign's as half of what flipping it changes, along dL/dW."""
    N, K = 4, 13
    layer = random_solution(kind, N, K, 3).pack()
    latent = layer.latent(True).double()
    x, probe = torch.randn(6, K, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    (latent(x) * probe).sum().backward()
    dL_dW = probe.T @ x
    for p in latent.scale_parameters():
        assert p.grad is not None
        direction = torch.randn_like(p)
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                p.add_(direction, alpha=step)
                values.append(float((latent(x) * probe).sum()))
                p.sub_(direction, alpha=step)
        assert float((p.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6, abs=1e-6)
    eye = torch.eye(K, dtype=torch.float64)
    for v in latent.code_parameters():
        with torch.no_grad():
            here = latent(eye).T
            v.neg_()
            change = latent(eye).T - here
            v.neg_()
        torch.testing.assert_close(v.grad, dL_dW * change / (-2 * v.sign()))


def test_latents_are_as_large_as_their_code_is_sure() -> None:
    """A target in the middle between two levels leaves the bit between them undecided."""
    s = Levels(torch.tensor([[[-3.0, -1.0, 1.0, 3.0]]]), torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 4)
    latent = s.pack().latent(True, torch.tensor([[-2.0, -5.0, 1.0, 1.0]]))
    # flipping A leads to -1, -3, 3, 1: middles -2, -2, 2, 2; flipping B to 1, 3, -3, -1: middles -1, 1, -1, 1
    sizes_A, sizes_B = torch.tensor([[0.0, 3, 1, 1]]), torch.tensor([[1.0, 6, 2, 0]])
    torch.testing.assert_close(latent.v_A.detach().abs(), sizes_A / sizes_A.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(latent.v_B.detach().abs(), sizes_B / sizes_B.mean(), atol=1e-5, rtol=0)
    assert torch.equal(latent.solution().codes, s.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_codes_and_scales_and_packs(kind: str) -> None:
    layer = random_solution(kind, 6, 16, 1).pack(torch.zeros(6))
    latent = layer.latent(True, torch.randn(6, 16))
    optimizer = torch.optim.Adam(latent.code_parameters() + latent.scale_parameters(), lr=0.03)
    x, y = torch.randn(64, 16), torch.randn(64, 6)
    losses = []
    for _ in range(20):
        loss = (latent(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    packed = latent.pack()
    assert not torch.equal(packed.codes, layer.codes)
    torch.testing.assert_close(packed(x), latent(x), rtol=2e-2, atol=2e-2)
    frozen = layer.latent(False)
    assert frozen.code_parameters() == []
    assert {p for p in frozen.parameters() if p.requires_grad} == set(frozen.scale_parameters())


@pytest.mark.parametrize("chosen", [0.0, 1.0])
def test_nothing_and_everything_chosen(chosen: float) -> None:
    mask = torch.full((3, 10), bool(chosen))
    s = Sparse8(torch.ones(3), torch.ones(3, 10), torch.ones(3), 5.0 * mask, mask)
    layer = s.pack()
    assert len(layer.values) == 30 * chosen
    assert torch.equal(layer(torch.ones(1, 10)), torch.full((1, 3), 50.0 if chosen else 10.0))
    assert torch.equal(layer.latent(True).pack().dequantize(), s.dense())


def test_idle_signs_are_stored_clear() -> None:
    """So the bytes of a weight do not depend on how it was come by."""
    layer = random_solution("sparse8", 6, 20).pack()
    assert isinstance(layer, Sparse8Linear)
    assert int(layer.mask.sum()) > 0
    assert int((layer.codes & layer.mask).sum()) == 0


def test_what_does_not_fit_is_refused() -> None:
    for kind, name in (("levels", "levels"), ("row_mean", "row_mean"), ("sparse8", "value_scale")):
        s = random_solution(kind, 3, 9)
        {"levels": lambda s: s.levels, "row_mean": lambda s: s.m, "sparse8": lambda s: s.s}[kind](s)[0] = 1e6
        with pytest.raises(LitBinqError, match=f"{name} has values that float16 cannot hold"):
            s.pack()
    bad = random_solution("levels", 3, 9)
    bad.codes[1, 2] = 4
    with pytest.raises(LitBinqError, match="got code 4, expected codes from 0 to 3"):
        bad.pack()
    linear = nn.Linear(9, 3)
    for layout in ({"group": 0}, {"zones": 3, "group": 4}, {}):
        with pytest.raises(LitBinqError, match="does not belong to format 'levels'"):
            empty_layer(linear, {"format": "levels", **layout})
    with pytest.raises(LitBinqError, match="does not belong to format 'sparse8'"):
        empty_layer(linear, {"format": "sparse8", "count": 28})
    layer = random_solution("sparse8", 3, 9).pack()
    layer.mask.zero_()
    with pytest.raises(ValueError, match="marks 0 weights"):
        layer.refresh()


def test_column_scales_of_any_size_fit() -> None:
    s = random_solution("scaled", 4, 12)
    big = Levels(s.levels * 2.0**-30, s.codes, s.group, s.salient, s.c * 2.0**30)
    assert torch.equal(big.pack().dequantize(), s.dense())
    big.c[3] = 0  # a dead column sets no mean
    assert float(big.pack().dequantize()[:, 3].abs().max()) == 0
    zero = Levels(s.levels, s.codes, s.group, s.salient, torch.zeros(12))
    assert float(zero.pack().dequantize().abs().max()) == 0


def test_a_packed_folder_reloads_to_the_same_bits(tokenizer, tmp_path) -> None:
    model = tiny_model("llama")
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    for i, (name, linear) in enumerate(linears.items()):
        s = random_solution(KINDS[i % len(KINDS)], *linear.weight.shape, seed=i)
        replace_module(model.model.layers, name, s.pack())
    assert {m.kind for m in model.modules() if isinstance(m, PackedLinear)} == {"levels", "row_mean", "sparse8"}
    assert {"levels", "row_mean", "sparse8"} <= FORMATS.keys()
    save_packed(model, tokenizer, tmp_path / "packed", facts={})
    loaded, _ = load_packed(tmp_path / "packed")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
