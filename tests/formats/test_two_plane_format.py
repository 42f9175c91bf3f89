"""The two-plane format: counted bits, exact reload, quantized inputs. Its other: test_two_plane_latent.py."""

import json

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import FORMATS, InputFormat, TwoPlaneLinear, packed_width, two_plane_matmul
from lit_binq.formats.activations import plain_scales
from lit_binq.formats.packing import unpack_signs
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.blocks import replace_module
from two_planes import element_by_element, half, quantized, weight


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int | bool]:
    K = draw(st.integers(1, 40))
    bits = draw(st.sampled_from((0, 4, 8)))
    return {
        "N": draw(st.integers(1, 9)),
        "K": K,
        "levels": draw(st.sampled_from((2, 3, 4))),
        "group": draw(st.sampled_from((8, 16, 24))),
        "P": draw(st.sampled_from([p for p in (0, 8, 16) if p < K])),
        "bits": bits,
        "static": bool(bits) and draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


@settings(deadline=None, max_examples=80)
@given(layout=layouts(), bias=st.booleans(), train=st.booleans(), target=st.booleans())
def test_three_states_of_one_weight(layout: dict[str, int], bias: bool, train: bool, target: bool) -> None:
    s = weight(**layout)
    N, K = s.codes.shape
    b = torch.randn(N) if bias else None
    layer = s.pack(b)
    W = element_by_element(s)
    torch.testing.assert_close(s.dense(), W)
    torch.testing.assert_close(layer.dequantize(), W, rtol=1e-6, atol=1e-6)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(int(layout["seed"])))
    x_hat = quantized(x, s.inputs)
    expected = nn.functional.linear(x_hat, W, b)
    # A value right between two codes may be rounded either way: by one step in one column.
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer(x.double()).dtype == torch.float64
    latent = layer.latent(train, torch.randn(N, K) if target else None)
    torch.testing.assert_close(latent(x), layer(x), rtol=1e-5, atol=1e-5)
    assert bool(latent.code_parameters()) == train
    again = latent.pack()
    assert again.layout() == layer.layout()
    for name, tensor in layer.weight_buffers().items():
        assert torch.equal(again.weight_buffers()[name], tensor), name


@settings(deadline=None, max_examples=60)
@given(layout=layouts(), bias=st.booleans())
def test_true_bits_count_every_stored_byte_and_reload_is_exact(layout: dict[str, int], bias: bool) -> None:
    layer = weight(**layout).pack(torch.randn(layout["N"]) if bias else None)
    state = layer.state_dict()
    assert layer.stored_bits() == 8 * sum(t.numel() * t.element_size() for n, t in state.items() if n != "bias")
    N, K, P = layer.out_features, layer.in_features, layer.outliers
    G = -(-K // layer.group)
    wanted = 2 * 8 * N * packed_width(K) + 16 * N * G * int(layout["levels"]) + 8 * packed_width(K) * (P > 0)
    wanted += 16 * 5 * (layer.activation_bits == 4) + 32 * 4 * bool(layout["static"])
    assert layer.stored_bits() == wanted
    again = empty_layer(nn.Linear(K, N, bias=bias), json.loads(json.dumps(describe_layer(layer))))
    again.load_state_dict(state)
    again.refresh()
    x = torch.randn(4, K)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.dequantize(), layer.dequantize())


@settings(deadline=None, max_examples=60)
@given(layout=layouts())
def test_stored_codes_name_ranks(layout: dict[str, int]) -> None:
    """2 A + B is the rank of the level; a1 >= a2 >= 0."""
    layer = weight(**layout).pack()
    K, numbers = layer.in_features, layer.levels.float()
    A, B = (unpack_signs(plane, K) > 0 for plane in (layer.codes, layer.selector))
    if numbers.shape[-1] == 4:
        assert (numbers[..., [0, 2, 1, 3]].diff(dim=-1) >= 0).all()
    else:
        assert (numbers[..., -2] >= numbers[..., -1]).all()
        assert (numbers[..., -1] >= 0).all()
    W = layer.solution().stored_dense()
    rank = 2 * A.long() + B.long()
    for first in range(0, K, layer.group):
        w, r = W[:, first : first + layer.group], rank[:, first : first + layer.group]
        below = r[:, :, None] < r[:, None, :]
        assert (w[:, :, None] <= w[:, None, :])[below].all()


def test_sizes_are_the_formulas() -> None:
    N, K = 256, 1024
    plain = {"levels": 4, "activation_bits": 0, "outliers": 0, "static": 0}
    for levels in (2, 3, 4):
        assert TwoPlaneLinear(K, N, group=128, **plain | {"levels": levels}).true_bits() == 2 + 16 * levels / 128
    assert TwoPlaneLinear(K, N, group=64, **plain).true_bits() == 3.0
    quantized = plain | {"activation_bits": 4, "outliers": 128, "static": 1}
    extra = TwoPlaneLinear(K, N, group=128, **quantized).true_bits() - 2.5
    assert extra == (K + 5 * 16 + 4 * 32) / (N * K)


@pytest.mark.parametrize("bias", [False, True])
def test_operands_are_what_a_node_reads(bias: bool) -> None:
    layer = weight(5, 20, P=8, bits=4).pack(torch.ones(5) if bias else None)
    ((op, operands),) = layer.operands()
    names = ["codes", "selector", "levels", "outlier_bits", "input_scales", "input_range", *["bias"] * bias]
    assert op == "TwoPlaneMatMul"
    assert all(a is getattr(layer, name) for a, name in zip(operands, names, strict=True))
    assert [t.dtype for t in operands[:6]] == [
        torch.uint8,
        torch.uint8,
        torch.half,
        torch.uint8,
        torch.half,
        torch.float,
    ]


def test_custom_operator_is_well_formed() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for bits in (0, 4, 8):
        layer = weight(5, 20, P=8, bits=bits).pack(torch.ones(5))
        buffers = (*layer.weight_buffers().values(), layer.bias)
        assert isinstance(layer, TwoPlaneLinear)
        arguments = (torch.randn(2, 20), *buffers, 20, 8, bits, 8)
        torch.library.opcheck(two_plane_matmul, arguments, test_utils=tests)


# ---- the input's format --------------------------------------------------------------------------------------------


def test_the_input_may_be_quantized_otherwise_afterwards() -> None:
    s = weight(6, 40, P=8)
    x = torch.randn(3, 40)
    o = s.inputs.outliers
    fitted = InputFormat(4, o, half(plain_scales() * 1.1), torch.tensor([-2.0, 4.0, -3.0, 6.0]))
    layer = s.pack()
    layer.set_inputs(fitted)
    assert layer.layout() == {"group": 8, "levels": 4, "activation_bits": 4, "outliers": 8, "static": 1}
    assert torch.equal(layer(x), s.with_inputs(fitted).pack()(x))
    torch.testing.assert_close(layer(x), quantized(x, fitted) @ s.dense().T, rtol=1e-4, atol=1e-4)
    layer.set_inputs(InputFormat(4, o))
    torch.testing.assert_close(layer.input_scales, plain_scales().half())
    for inputs, sizes in ((InputFormat(8, o), (0, 0)), (InputFormat(0, o, plain_scales(), fitted.range), (0, 0))):
        layer.set_inputs(inputs)
        assert (len(layer.input_scales), len(layer.input_range)) == sizes
        assert layer.inputs().activation_bits == inputs.activation_bits
    assert torch.equal(layer.dequantize(), s.dense())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (InputFormat(5), "activation_bits: got 5, expected 0, 4 or 8"),
        (InputFormat(4, torch.arange(7)), "outliers: got 7 of 24 columns"),
        (InputFormat(4, torch.arange(24)), "outliers: got 24 of 24 columns"),
        (InputFormat(4, torch.arange(8).flip(0)), "ascending"),
        (InputFormat(4, torch.tensor([0, 1, 2, 3, 4, 5, 5, 6])), "each once"),
        (InputFormat(4, torch.arange(20, 28)), "outliers: got 8 of 24"),
        (InputFormat(4, scales=torch.ones(4)), r"input scales: got shape \(4,\), expected \(5,\)"),
        (InputFormat(8, range=torch.ones(2)), r"input range: got shape \(2,\), expected \(4,\)"),
        (InputFormat(4, scales=torch.full((5,), 1e6)), "input_scales has values that float16 cannot hold"),
        (InputFormat(4, torch.arange(8)), "not the 0 the weight was solved for"),
    ],
)
def test_inputs_that_cannot_be_stored_are_refused(inputs: InputFormat, words: str) -> None:
    layer = weight(3, 24).pack()
    before = layer.layout()
    with pytest.raises(LitBinqError, match=words) as caught:
        layer.set_inputs(inputs)
    assert "\n" not in str(caught.value)
    assert layer.layout() == before


def test_weights_that_cannot_be_stored_are_refused() -> None:
    s = weight(3, 24)
    s.codes[1, 2] = 4
    with pytest.raises(LitBinqError, match="got code 4, expected codes from 0 to 3"):
        s.pack()
    s = weight(3, 24)
    s.levels[0, 1, 2] = 7e4
    with pytest.raises(LitBinqError, match="levels has values that float16 cannot hold"):
        s.pack()
    linear = nn.Linear(24, 3)
    good = {"group": 8, "levels": 4, "activation_bits": 0, "outliers": 0, "static": 0}
    for wrong in (
        {"levels": 5},
        {"activation_bits": 2},
        {"outliers": 4},
        {"outliers": 24},
        {"static": 2},
        {"zones": 1},
    ):
        with pytest.raises(LitBinqError, match="does not belong to format 'two_plane'"):
            empty_layer(linear, {"format": "two_plane", **good, **wrong})
    with pytest.raises(LitBinqError, match="multiple of 8"):
        empty_layer(linear, {"format": "two_plane", **good, "group": 12})
    layer = weight(3, 24, P=8).pack()
    layer.outlier_bits[0] ^= 1
    with pytest.raises(ValueError, match="expected 8"):
        layer.refresh()


# ---- extremes, and the whole way to a file ------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_extremes(levels: int, bits: int) -> None:
    """Zeros, levels at float16's end and below its normal range, inputs that are constant or huge."""
    s = weight(6, 24, levels=levels, P=8, bits=bits)
    s.levels[0] = 0
    s.levels[1] = 65504.0
    s.levels[2] = 6e-8
    s.levels[3, 1] = 0
    layer = s.pack()
    torch.testing.assert_close(layer.dequantize(), s.dense())
    latent = layer.latent(True, torch.randn(6, 24))
    assert all(torch.isfinite(p).all() for p in latent.parameters())
    x = torch.stack((torch.zeros(24), torch.full((24,), -3.25), torch.randn(24) * 1e20, torch.randn(24) * 1e-20))
    y = latent(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, layer(x))
    y[:2].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in latent.parameters())
    assert torch.equal(latent.pack().dequantize(), layer.dequantize())
    assert torch.equal(y[0], torch.zeros(6))
    exact = x[1:2].double() @ layer.dequantize().double().T
    torch.testing.assert_close(y[1:2].double(), exact, rtol=1e-3, atol=1e-3)


def test_a_packed_folder_reloads_to_the_same_bits(tokenizer, tmp_path) -> None:
    model = tiny_model("llama")
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    for i, (name, linear) in enumerate(linears.items()):
        (N, K), bits = linear.weight.shape, (0, 4, 8)[i % 3]
        s = weight(N, K, levels=2 + i % 3, P=8 * (i % 2), bits=bits, static=bits > 0 and i % 4 == 1, seed=i)
        replace_module(model.model.layers, name, s.pack())
    assert "two_plane" in FORMATS
    save_packed(model, tokenizer, tmp_path / "packed", facts={})
    loaded, _ = load_packed(tmp_path / "packed")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
