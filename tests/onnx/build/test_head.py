"""Rounded embeddings and heads: what the operators multiply by is what `dense` says, and torch can compute with it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from exporting import fusable_model, packed_model
from lit_binq.errors import LitBinqError
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.build.head import read_tables, rounded_tables
from lit_binq_onnx.build.head_rounding import _pack, _unpack, head_gram, quantize_table, random_windows
from lit_binq_onnx.runtime.session import DATA, FACTS, FUSED, MODEL, OnnxModel, read_facts
from native import require_native


def table(rows: int, width: int, seed: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal((rows, width))).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 999), st.floats(1e-6, 1e6), st.sampled_from([4, 8]))
def test_rounding_errs_by_half_a_step(rows: int, groups: int, seed: int, size: float, bits: int) -> None:
    W = table(rows, 16 * groups, seed, size)
    rounded = quantize_table(W, bits)
    error = np.abs(rounded.dense() - W).reshape(rows, -1, rounded.block)
    blocks = W.reshape(rows, -1, rounded.block)
    spread = np.maximum(blocks.max(2), 0) - np.minimum(blocks.min(2), 0)
    if bits == 8:
        assert (error <= np.abs(blocks).max(2, keepdims=True) / 127 * 0.5001).all()
    else:  # shrinking pays only where the squared error gets smaller than rounding to the whole range
        assert (np.square(error).sum(2) <= rounded.block * np.square(spread / 15 * 0.5001) * 4).all()
    assert rounded.codes.shape == (rows, 16 * groups * bits // 8)


def test_figures_of_normal_weights() -> None:
    W = table(500, 64, 0)
    for bits, stored, error in ((8, 9.0, 0.006), (4, 5.25, 0.085)):
        rounded = quantize_table(W, bits)
        assert np.linalg.norm(rounded.dense() - W) / np.linalg.norm(W) < error
        assert rounded.stored_bits() <= stored
        assert rounded.blocked().shape == (500, 2, 32 * bits // 8)


def test_extreme_tables() -> None:
    for bits in (4, 8):
        zeros = np.zeros((3, 32), np.float32)
        np.testing.assert_array_equal(quantize_table(zeros, bits).dense(), zeros)
        constant = np.full((2, 48), -3.5, np.float32)
        rounded = quantize_table(constant, bits)
        assert rounded.block == 16
        # a scale has 11 bits: to the nearest at 4 bits, the next one down at 8
        np.testing.assert_allclose(rounded.dense(), constant, rtol=2**-11 if bits == 4 else 2**-10)
        tiny = np.full((1, 16), 2e-45, np.float32)  # no scale is as small as it would need
        assert np.abs(quantize_table(tiny, bits).dense()).max() <= 2e-45


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.floats(1e-30, 1e30), st.sampled_from([4, 8]), st.booleans())
def test_scales_have_the_bits_of_float16(seed: int, size: float, bits: int, fed: bool) -> None:
    H = torch.from_numpy(table(90, 64, seed + 1))
    scales = quantize_table(table(9, 64, seed, size), bits, gram=H.T @ H if fed else None).scales
    mantissa = np.frexp(scales)[0] * 2048
    assert (scales > 0).all()
    assert (mantissa == np.rint(mantissa)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_two_codes_to_a_byte(rows: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 16, (rows, width)).astype(np.uint8)
    np.testing.assert_array_equal(_unpack(_pack(values))[:, :width], values)


def test_refused_tables() -> None:
    with pytest.raises(LitBinqError, match="head_bits: got 3, expected one of 0, 4, 8"):
        quantize_table(table(2, 32, 0), 3)
    with pytest.raises(LitBinqError, match="the embedding is 20 wide, expected a multiple of 16"):
        quantize_table(table(2, 20, 0), 8)
    with pytest.raises(LitBinqError, match="not finite"):
        quantize_table(np.full((2, 32), np.nan, np.float32), 4)


def test_the_model_gets_its_tables_back() -> None:
    for kind in ("llama", "qwen2"):
        model = fusable_model(kind)
        before = {n: p.clone() for n, p in model.named_parameters()}

        def fail(model: torch.nn.Module = model) -> None:
            with rounded_tables(model, 4) as tables:
                assert tables is not None
                np.testing.assert_array_equal(model.get_input_embeddings().weight.numpy(), tables.embedding.dense())
                np.testing.assert_array_equal(model.lm_head.weight.numpy(), tables.head.dense())
                assert len(tables.distinct()) == 2
                raise RuntimeError

        with torch.no_grad(), pytest.raises(RuntimeError):
            fail()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with rounded_tables(model, 0) as tables:
        assert tables is None
    tied = fusable_model("llama")
    with rounded_tables(tied, 8) as tables:
        assert tables is not None
        assert len(tables.distinct()) == 1
    with rounded_tables(tied, 4):
        assert tied.lm_head.weight is not tied.get_input_embeddings().weight
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize(("kind", "bits"), [("llama", 8), ("llama", 4), ("qwen2", 4), ("opt", 8), ("opt", 4)])
def test_rounded_exports_equal_rounded_torch(kind: str, bits: int, tmp_path: Path) -> None:
    """Both graphs, tied (LLaMA, OPT) and not: within 1e-4 of torch on the rounded tables, visibly off the others."""
    model = packed_model(kind) if kind == "opt" else fusable_model(kind)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    facts = export_onnx(model, byte_tokenizer(), tmp_path / "out", head_bits=bits, check=False)
    assert facts["head_bits"] == bits
    with torch.no_grad():
        plain = model(input_ids=ids).logits.numpy()
        # a head of 4 bits was rounded with what export knows of its inputs: not the same without
        with rounded_tables(model, bits, stored=tmp_path / "out" if bits == 4 else None):
            expected = model(input_ids=ids).logits.numpy()
    scale, where = np.abs(expected).max(), np.broadcast_to(np.arange(9), (2, 9))
    assert np.abs(plain - expected).max() > 1e-3 * scale
    for route in ("generic", "fused") if kind != "opt" else ("generic",):
        sessions = [OnnxModel(tmp_path / "out", native=False, mode=mode, route=route) for mode in ("exact", "lut")]
        exact, lut = (m.forward(ids.numpy(), np.ones((2, 9)), where, m.empty_past(2))[0] for m in sessions)
        np.testing.assert_allclose(exact, expected, atol=1e-4 * scale, rtol=0)
        # int8 activations in the head only, as the function bodies compute in float32
        assert 1e-4 < np.abs(lut - expected).max() / scale < 0.05
        name = MODEL if route == "generic" else FUSED
        proto = onnx.load(tmp_path / "out" / name, load_external_data=False)
        kinds = [n.op_type for n in proto.graph.node]
        assert [kinds.count(kind) for kind in ("GatherBlockQuantized", "NBitsMatMul", "MatMulNBits")] == [1, 1, 0]
        bodies = {f.name: [n.op_type for n in f.node] for f in proto.functions}
        assert bodies["NBitsMatMul"] == ["MatMulNBits"]
        stored = {t.name: t.data_type for t in proto.graph.initializer}
        assert {kind for n, kind in stored.items() if n.endswith(".scales")} == {onnx.TensorProto.FLOAT}
        # the dense table is nowhere
        assert not any(list(t.dims) in ([260, 64], [64, 260], [260, 32]) and t.data_type == 1
                       for t in proto.graph.initializer)  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
def test_the_native_head_is_the_stock_one(bits: int, tmp_path: Path) -> None:
    """Native and body, both routes: exact ones agree as floats do; rounded ones as two roundings of one input."""
    library = require_native()
    model, out = fusable_model("llama"), tmp_path / "out"
    facts = export_onnx(model, byte_tokenizer(), out, head_bits=bits, check=False)
    ids, where = np.arange(14).reshape(2, 7) * 9, np.broadcast_to(np.arange(7), (2, 7))
    for route in ("generic", "fused"):
        logits = {}
        counted = facts["packed_nodes"] + 1 + (model.config.num_hidden_layers if route == "fused" else 0)  # attention
        for native in (True, False):
            for mode in ("exact", "lut"):
                m = OnnxModel(out, native=native, mode=mode, route=route)
                before = library.calls()
                logits[native, mode] = m.forward(ids, np.ones((2, 7)), where, m.empty_past(2))[0]
                assert library.calls() - before == (counted if native else 0)
        size = np.abs(logits[False, "exact"]).max()
        np.testing.assert_allclose(logits[True, "exact"], logits[False, "exact"], rtol=0, atol=1e-4 * size)
        np.testing.assert_allclose(logits[True, "lut"], logits[False, "exact"], rtol=0, atol=0.05 * size)


def test_tied_tables_share_their_bytes(tmp_path: Path) -> None:
    model = fusable_model("llama")
    with rounded_tables(model, 8) as tables:
        assert tables is not None
        codes = tables.embedding.codes.tobytes()
    facts = export_onnx(model, byte_tokenizer(), tmp_path / "out", head_bits=8, check=False)
    assert facts["token_bytes"] == facts["data_bytes"]
    assert (tmp_path / "out" / DATA).read_bytes().count(codes) == 1
    places = set()
    for name in (MODEL, FUSED):
        proto = onnx.load(tmp_path / "out" / name, load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.UINT8 and tensor.dims[0] == 260:
                places.add(next(e.value for e in tensor.external_data if e.key == "offset"))
    assert len(places) == 1


def test_the_check_knows_the_rounding(tmp_path: Path) -> None:
    model, out = fusable_model("qwen3"), tmp_path / "out"
    export_onnx(model, byte_tokenizer(), out, head_bits=4)
    assert all(case.passed for case in check_onnx(out, model).cases)
    (out / FACTS).write_text(json.dumps({**read_facts(out), "head_bits": 0}))
    with pytest.raises(LitBinqError, match="check: prefill"):
        check_onnx(out, model)


def correlated(rows: int, width: int, rank: int) -> torch.Tensor:
    """Inputs with a few strong directions and a mean, as those of a head have."""
    g = torch.Generator().manual_seed(7)
    strong = torch.randn(rows, rank, generator=g) @ torch.randn(rank, width, generator=g)
    return strong + 0.3 * torch.randn(rows, width, generator=g) + torch.randn(width, generator=g)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_error_feedback_lowers_the_error_of_the_products(block: int) -> None:
    W, x = table(300, 128, 3, 0.1), correlated(1000, 128, 9)
    H = x.T @ x / len(x)

    def error(gram: torch.Tensor | None) -> float:
        dense = torch.from_numpy(quantize_table(W, 4, block=block, gram=gram).dense())
        return float((x @ (dense - torch.from_numpy(W)).T).norm() / (x @ torch.from_numpy(W).T).norm())

    assert error(H) < 0.35 * error(None)
    # nothing to gain where inputs are all alike: the same as rounding to the nearest
    plain = quantize_table(W, 4, block=block)
    same = quantize_table(W, 4, block=block, gram=torch.eye(128))
    np.testing.assert_array_equal(same.codes, plain.codes)


def test_searched_grids_beat_the_whole_range() -> None:
    """Against w^ = lo + s q of the whole range, which is what 16 levels do without a search."""
    W = table(400, 64, 5)
    blocks = W.reshape(400, 2, 32)
    low, high = np.minimum(blocks.min(2), 0)[..., None], np.maximum(blocks.max(2), 0)[..., None]
    s = (high - low) / 15
    z = np.rint(-low / s)
    plain = (np.clip(np.rint(blocks / s) + z, 0, 15) - z) * s
    searched = quantize_table(W, 4).dense().reshape(blocks.shape)
    error = [np.square(q - blocks).sum(2) for q in (searched, plain)]
    assert (error[0] <= error[1] * 1.0001).all()
    assert error[0].sum() < 0.95 * error[1].sum()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 999), st.floats(1e-6, 1e6), st.booleans())
def test_codes_scales_and_zeros_say_what_was_rounded(rows: int, groups: int, seed: int, size: float, fed: bool) -> None:
    """Any size, more weights than inputs, blocks of zeros and of one sign: finite, and near enough to be a rounding."""
    W = table(rows, 32 * groups, seed, size)
    W[0, :32] = 0
    W[-1] = np.abs(W[-1])
    x = torch.from_numpy(table(5, 32 * groups, seed + 1))
    H = x.T @ x + 0.1 * torch.eye(32 * groups)
    rounded = quantize_table(W, 4, gram=H if fed else None)
    dense = rounded.dense()
    assert np.isfinite(dense).all()
    assert (np.linalg.norm(dense - W, axis=1) <= 0.6 * np.linalg.norm(W, axis=1) + 1e-9 * size).all()


def test_gram_of_the_heads_inputs() -> None:
    model = fusable_model("qwen2")
    windows = random_windows(model, 5)
    assert windows.shape == (5, 128)  # as many positions as it has
    with torch.no_grad():
        x = model.model(input_ids=windows).last_hidden_state.reshape(-1, 64)
    H = x.T @ x / len(x)
    torch.testing.assert_close(head_gram(model, windows, damping=0.0), H, rtol=1e-4, atol=1e-5)
    damped = head_gram(model, windows, damping=0.5)
    torch.testing.assert_close(damped - H, 0.5 * H.diagonal().mean() * torch.eye(64), rtol=1e-3, atol=1e-4)
    assert not model.lm_head._forward_pre_hooks


def test_a_text_changes_the_head_and_the_check_reads_it(tmp_path: Path) -> None:
    model, text = fusable_model("llama"), tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and the dog saw it. " * 40)
    found = {}
    for name, options in (("random", {}), ("text", {"head_text": str(text)}), ("block", {"head_block": 64})):
        out = tmp_path / name
        facts = export_onnx(model, byte_tokenizer(), out, head_bits=4, check=False, **options)
        found[name] = read_tables(out, 4)
        assert facts["head_text"] == ("text.txt" if name == "text" else None)
        assert facts["data_bytes"] - facts["token_bytes"] == 260 * 64 + 260 * 2 * 4  # the embedding
    assert [t.head.block for t in found.values()] == [32, 32, 64]
    assert [t.embedding.bits for t in found.values()] == [8] * 3
    assert (found["random"].head.codes != found["text"].head.codes).any()
    assert all(case.passed for case in check_onnx(tmp_path / "text", model).cases)
    other = fusable_model("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(torch.randn(260, 64))
    with pytest.raises(LitBinqError, match="the stored embedding"):
        check_onnx(tmp_path / "text", other)
    (tmp_path / "text" / DATA).write_bytes(b"")
    with pytest.raises(LitBinqError, match="its rounded embedding and head cannot be read"):
        read_tables(tmp_path / "text", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_bits": 8, "head_text": "a.txt"}, "head_text: got 'a.txt' with 8 head_bits, expected 4"),
        ({"head_block": 32}, "head_block: got 32 with 0 head_bits"),
        (
            {"head_bits": 4, "head_block": 128},
            "head_block: got 128, expected one that divides the width 64: 16, 32, 64",
        ),
        ({"head_bits": 4, "head_block": 48}, "head_block: got 48"),
        ({"head_bits": 4, "head_text": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_wrong_options_of_the_head(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match=message):
        export_onnx(
            fusable_model("llama"), byte_tokenizer(), tmp_path / "out", **options  # type: ignore[arg-type]  # mixed
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_wrong_number_of_bits(tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match="head_bits: got 5, expected one of 0, 4, 8"):
        export_onnx(packed_model("llama"), byte_tokenizer(), tmp_path / "out", head_bits=5)
    assert list(tmp_path.iterdir()) == []
