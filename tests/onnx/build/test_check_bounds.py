"""What decides in the check of an export, what is only told, and what its messages say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer
from transformers import PreTrainedModel

import lit_binq_onnx.build.check as check_module
import lit_binq_onnx.build.check_reference as reference_module
from exporting import fusable_model, packed_model
from lit_binq.errors import LitBinqError
from lit_binq.models.kv_cache import set_kv_bits
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.check_reference import ROUNDED_TOLERANCE, sensitivity
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.session import OnnxModel
from native import require_native

OLD_LIMIT = 0.2
"""What int8 tables were once allowed in any model."""


@pytest.mark.parametrize("bits", [0, 4])
def test_a_bound_of_its_own_is_told(bits: int, tmp_path: Path) -> None:
    model = packed_model("llama")
    set_kv_bits(model, bits)
    export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False, fused="off")
    report = str(check_onnx(tmp_path / "out", model, byte_tokenizer()))
    told = [line for line in report.splitlines() if "every way within rms <= " in line]
    assert len(told) == (bits > 0)
    if told:
        assert float(told[0].split("<= ")[1].split(":")[0]) >= ROUNDED_TOLERANCE


def sensitive_model() -> PreTrainedModel:
    """Attention so sharp that a small error makes it look elsewhere."""
    model = fusable_model("llama")
    for name, layer in model.named_modules():
        if name.endswith("q_proj"):
            layer.row_scale.mul_(64)
    return model


def test_a_sensitive_model_is_right(tmp_path: Path) -> None:
    require_native()
    model = sensitive_model()
    export_onnx(model, byte_tokenizer(), tmp_path / "out")
    report = check_onnx(tmp_path / "out", model, byte_tokenizer())
    assert max(case.rms for case in report.cases if case.variant == "lut") > OLD_LIMIT
    assert all(case.passed for case in report.cases)
    assert "errors of 0.7% in every product move torch's by" in str(report)


def test_sensitivity_is_a_property_of_the_model() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (1, 24))
    plain, sharp = fusable_model("llama"), sensitive_model()
    assert sensitivity(plain, ids) == sensitivity(plain, ids)
    assert 0.005 < sensitivity(plain, ids) < 0.1 < sensitivity(sharp, ids)
    assert sensitivity(plain, ids, 7e-4) == pytest.approx(sensitivity(plain, ids) / 10, rel=0.05)
    assert not any(m._forward_hooks for m in plain.modules())


@pytest.mark.parametrize("kind", ["llama", "sensitive"])
def test_broken_int8_kernels_are_noticed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    model = sensitive_model() if kind == "sensitive" else fusable_model(kind)
    export_onnx(model, byte_tokenizer(), tmp_path / "out")
    forward = OnnxModel.forward

    def broken(self: OnnxModel, *args: Any, **options: Any) -> Any:
        logits, cache = forward(self, *args, **options)
        return (logits if self.mode == "exact" else np.roll(logits, 1, axis=-1)), cache

    monkeypatch.setattr(OnnxModel, "forward", broken)
    with pytest.raises(LitBinqError, match=r"prefill \(lut\).* in float32 the file is right, .*int8 kernels") as caught:
        check_onnx(tmp_path / "out", model)
    assert "damaged" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chaotic_model_is_judged_by_its_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    model = fusable_model("llama")
    export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)
    monkeypatch.setattr(reference_module, "sensitivity", lambda *_: 1.2)
    report = str(check_onnx(tmp_path / "out", model))
    assert "so sensitive that only its first block is judged" in report
    arrays = check_module.cache_arrays

    def broken(cache: Any) -> list[np.ndarray]:
        found = arrays(cache)
        return [found[0] * 1.5, *found[1:]] if len(opened) and opened[-1].mode == "lut" else found

    opened: list[OnnxModel] = []
    forward = OnnxModel.forward
    monkeypatch.setattr(OnnxModel, "forward", lambda self, *a, **o: (opened.append(self), forward(self, *a, **o))[1])
    monkeypatch.setattr(check_module, "cache_arrays", broken)
    with pytest.raises(LitBinqError, match=r"prefill \(lut\)"):
        check_onnx(tmp_path / "out", model)
