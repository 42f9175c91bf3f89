"""Rounded embeddings and heads: what the operators multiply by is what `dense` says, and torch can compute with it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import byte_tokenizer
from exporting import fusable_model, packed_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.errors import LitBinqError
from lit_binq_onnx.check import check_onnx
from lit_binq_onnx.export import export_onnx
from lit_binq_onnx.head import _pack, _unpack, quantize_table, rounded_tables
from lit_binq_onnx.session import DATA, FACTS, FUSED, MODEL, OnnxModel, read_facts


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
        np.testing.assert_allclose(rounded.dense(), constant, rtol=1e-5)


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
                assert len(tables.distinct()) == (1 if model.config.tie_word_embeddings else 2)
                raise RuntimeError

        with torch.no_grad(), pytest.raises(RuntimeError):
            fail()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with rounded_tables(model, 0) as tables:
        assert tables is None


@pytest.mark.parametrize(("kind", "bits"), [("llama", 8), ("qwen2", 4), ("opt", 8)])
def test_rounded_exports_equal_rounded_torch(kind: str, bits: int, tmp_path: Path) -> None:
    """Both graphs, tied (LLaMA, OPT) and not: within 1e-4 of torch on the rounded tables, visibly off the others."""
    model = packed_model(kind) if kind == "opt" else fusable_model(kind)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(input_ids=ids).logits.numpy()
        with rounded_tables(model, bits):
            expected = model(input_ids=ids).logits.numpy()
    facts = export_onnx(model, byte_tokenizer(), tmp_path / "out", head_bits=bits, check=False)
    assert facts["head_bits"] == bits
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
        assert (kinds.count("GatherBlockQuantized"), kinds.count("MatMulNBits")) == (1, 1)
        # the dense table is nowhere
        assert not any(list(t.dims) in ([260, 64], [64, 260], [260, 32]) and t.data_type == 1
                       for t in proto.graph.initializer)  # fmt: skip


def test_tied_tables_share_their_bytes(tmp_path: Path) -> None:
    model = fusable_model("llama")
    with rounded_tables(model, 8) as tables:
        assert tables is not None
        codes = tables.embedding.codes.tobytes()
    export_onnx(model, byte_tokenizer(), tmp_path / "out", head_bits=8, check=False)
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


def test_wrong_number_of_bits(tmp_path: Path) -> None:
    with pytest.raises(LitBinqError, match="head_bits: got 5, expected one of 0, 4, 8"):
        export_onnx(packed_model("llama"), byte_tokenizer(), tmp_path / "out", head_bits=5)
    assert list(tmp_path.iterdir()) == []
