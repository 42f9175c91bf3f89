"""What the check of an export says about the bound it used."""

from pathlib import Path

import pytest
from conftest import byte_tokenizer
from exporting import packed_model

from lit_binq.kv_cache import set_kv_bits
from lit_binq_onnx.check import LUT_TOLERANCE, check_onnx
from lit_binq_onnx.export import export_onnx


@pytest.mark.parametrize("bits", [0, 4])
def test_a_bound_of_its_own_is_told(bits: int, tmp_path: Path) -> None:
    model = packed_model("llama")
    set_kv_bits(model, bits)
    export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False, fused="off")
    report = str(check_onnx(tmp_path / "out", model, byte_tokenizer()))
    told = [line for line in report.splitlines() if "every way within rms <= " in line]
    assert len(told) == (bits > 0)
    if told:
        assert float(told[0].split("<= ")[1].split(":")[0]) >= LUT_TOLERANCE
