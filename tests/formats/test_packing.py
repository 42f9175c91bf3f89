"""The byte layout: every byte value, every width, and the inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.errors import LitBinqError
from lit_binq.formats import pack_signs, packed_width, packing, unpack_signs
from lit_binq.solvers import PlanesSolver, Problem


def plain_pack(rows: list[list[int]]) -> list[list[int]]:
    """The layout spelled out: column k at bit k % 8 of byte k // 8, +1 as a set bit."""
    return [
        [
            sum(1 << k % 8 for k in range(8 * j, min(8 * j + 8, len(row))) if row[k] > 0)
            for j in range(-(-len(row) // 8))
        ]
        for row in rows
    ]


def test_the_example_of_the_documentation():
    B = torch.tensor([[1, -1, 1, 1, -1, -1, -1, 1, -1, 1]])
    assert pack_signs(B).tolist() == [[0b1000_1101, 0b0000_0010]]


def test_all_byte_values():
    codes = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    signs = unpack_signs(codes, 8)
    for byte in range(256):
        assert signs[byte].tolist() == [1.0 if byte >> k & 1 else -1.0 for k in range(8)]
    assert torch.equal(pack_signs(signs), codes)


@settings(deadline=None, max_examples=60)
@given(N=st.integers(1, 5), K=st.integers(1, 70), data=st.data())
def test_round_trip_and_layout_at_every_width(N, K, data):
    rows = data.draw(st.lists(st.lists(st.sampled_from([-1, 1]), min_size=K, max_size=K), min_size=N, max_size=N))
    B = torch.tensor(rows, dtype=torch.float32)
    codes = pack_signs(B)
    assert codes.dtype == torch.uint8
    assert codes.shape == (N, packed_width(K))
    assert codes.tolist() == plain_pack(rows)  # padding bits are clear, too
    assert torch.equal(unpack_signs(codes, K), B)


@settings(deadline=None, max_examples=30)
@given(K=st.integers(1, 40), seed=st.integers(0, 1000))
def test_padding_bits_do_not_matter_to_unpacking(K, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (3, packed_width(K)), generator=g, dtype=torch.uint8)
    signs = unpack_signs(codes, K)
    assert signs.shape == (3, K)
    assert torch.equal(unpack_signs(pack_signs(signs), K), signs)


def test_zero_counts_as_plus_and_negative_zero_too():
    assert unpack_signs(pack_signs(torch.tensor([[0.0, -0.0, -1e-30, 1e-30]])), 4).tolist() == [[1, 1, -1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unpacking_to_a_dtype(dtype):
    signs = unpack_signs(torch.tensor([[5]], dtype=torch.uint8), 3, dtype)
    assert signs.dtype == dtype
    assert signs.tolist() == [[1, -1, 1]]


def test_bad_arrays_are_refused():
    with pytest.raises(LitBinqError, match="expected a matrix"):
        pack_signs(torch.ones(8))
    for codes in (torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 1), torch.zeros(2, dtype=torch.uint8)):
        with pytest.raises(LitBinqError, match=r"expected uint8 \(N, 1\) for 8 columns"):
            unpack_signs(codes, 8)


@pytest.mark.parametrize("shares", [[], [1.0, 0.5]])
def test_kept_weights_give_the_same_products_and_are_forgotten(shares, monkeypatch):
    """Also where they are too many to keep, and for a layer that takes an older one's place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 24, generator=generator)
    for limit in (1 << 30, 0):
        monkeypatch.setattr(packing, "KEPT_BYTES", limit)
        with packing.weights_kept():
            for _ in range(3):
                T = torch.randn(5, 24, generator=generator)
                layer = PlanesSolver(shares=shares).solve(Problem(T, torch.eye(24))).pack()
                assert torch.equal(layer(x), layer(x))
                torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.dequantize()))
            assert len(packing._kept) == (3 if limit else 0)
        assert packing._kept is None
