"""The check of an export sees what is right for short texts only, at a bounded cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import byte_tokenizer, tiny_model

import lit_binq_onnx.build.check_lengths as lengths_module
import lit_binq_onnx.build.export as export_module
import lit_binq_onnx.build.trace as trace_module
from exporting import fusable_model
from length_models import ORIGINAL, WINDOW, length_config, length_model
from lit_binq.errors import LitBinqError
from lit_binq.models.rotary import dependent_modules
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.check_lengths import Border, borders, make_plan, parts
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.build.fused import build_fused
from lit_binq_onnx.build.rotary import LengthRotary
from lit_binq_onnx.runtime.rows import PREFILL

# --- which lengths


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("phi3-longrope", [("part", PREFILL), ("angles", ORIGINAL)]),
        ("llama-yarn", [("part", PREFILL), ("angles", ORIGINAL)]),
        ("llama-llama3", [("part", PREFILL), ("angles", ORIGINAL)]),
        ("llama-dynamic", [("part", PREFILL), ("angles", ORIGINAL)]),
        ("mistral", [("window", WINDOW), ("part", PREFILL)]),
        ("gemma3", [("window", WINDOW), ("part", PREFILL)]),
        ("gpt-neo", [("window", WINDOW), ("part", PREFILL)]),
        ("bloom", [("part", PREFILL)]),
    ],
)
def test_borders_of_a_model(kind: str, wanted: list[tuple[str, int]]) -> None:
    assert [(b.kind, b.at) for b in borders(length_config(kind))] == wanted


def test_a_model_with_few_positions_has_no_borders() -> None:
    assert borders(tiny_model("llama").config) == []  # 128 positions


def test_parts_cross_every_border_by_decoding() -> None:
    found = parts(310, [Border("window", 24), Border("part", 256), Border("angles", 300)])
    assert [p for p in found if p[1] - p[0] > 1] == [(0, 21), (28, 256), (258, 297), (304, 310)]
    ends = [end for _, end in found]
    assert [start for start, _ in found] == [0, *ends[:-1]]
    assert ends[-1] == 310
    for border in (24, 256, 300):
        assert (border, border + 1) in found or (border + 1, border + 2) in found


def test_cost_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = length_model("llama-yarn"), [(2, 16)] * 4
    plan = make_plan(model, shapes)
    assert (plan.tokens, plan.whole, len(plan.read)) == (305, 305, 2)
    monkeypatch.setattr(lengths_module, "WORK", 100 * lengths_module.weights_per_token(model))
    plan = make_plan(model, shapes)
    assert (plan.tokens, plan.whole) == (0, 48)
    assert plan.cached == [Border("part", 256), Border("angles", 300)]
    monkeypatch.setattr(lengths_module, "CACHE_BYTES", 512 * 280)
    assert make_plan(model, shapes).by_position == [Border("angles", 300)]
    assert make_plan(model, shapes).notes()[1].startswith("lengths: first angles (300) crossed by positions alone")
    model.config.sliding_window = 400
    with pytest.raises(LitBinqError, match=r"check: the window \(400\) of LlamaForCausalLM cannot be crossed"):
        make_plan(model, shapes)


# --- what is seen


def cheap(monkeypatch: pytest.MonkeyPatch, *, cache: int = 1 << 30) -> None:
    """As for a model so large that only 100 tokens of it can be read."""
    monkeypatch.setattr(lengths_module, "WORK", 0)
    monkeypatch.setattr(lengths_module, "MOST_TOKENS", 100)
    monkeypatch.setattr(lengths_module, "CACHE_BYTES", cache)


@contextmanager
def first_angles_only(model: Any) -> Iterator[None]:
    """What a trace does that loses the choice."""
    found = dependent_modules(model)
    for name, module in found.items():
        traced = LengthRotary(module)
        traced._frequencies = lambda *_, module=module: module.original_inv_freq  # type: ignore[method-assign]
        model.set_submodule(name, traced)
    yield
    for name, module in found.items():
        model.set_submodule(name, module)


@pytest.mark.parametrize("cost", ["read", "cached", "by position"])
def test_angles_that_are_right_for_short_texts_only(cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cost != "read":
        cheap(monkeypatch, cache=1 << 30 if cost == "cached" else 512 * 280)
    model = length_model("phi3-longrope")
    export_onnx(model, byte_tokenizer(), tmp_path / "right")
    monkeypatch.setattr(trace_module, "traceable_rotary", first_angles_only)
    case = {"read": "long beside short", "cached": "beyond 300", "by position": "position 300"}[cost]
    with pytest.raises(LitBinqError, match=rf"check: {case} \((exact|unmodified)\) differs from torch"):
        export_onnx(model, byte_tokenizer(), tmp_path / "wrong")


@pytest.mark.parametrize("cost", ["read", "cached"])
def test_a_window_that_is_a_token_too_long(cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cost == "cached":
        cheap(monkeypatch)
        monkeypatch.setattr(lengths_module, "MOST_TOKENS", 20)
    model = length_model("gemma3")
    right = trace_module.trace

    def wrong(model: Any) -> Any:
        model.config.sliding_window += 1
        try:
            return right(model)
        finally:
            model.config.sliding_window -= 1

    monkeypatch.setattr(export_module, "trace", wrong)
    case = {"read": "(long beside short|read in parts)", "cached": f"beyond {WINDOW}"}[cost]
    with pytest.raises(LitBinqError, match=rf"check: {case} \((exact|unmodified)\) differs from torch"):
        export_onnx(model, byte_tokenizer(), tmp_path / "wrong")


@pytest.mark.parametrize("cost", ["read", "cached"])
def test_a_fused_window_that_is_a_token_too_long(
    cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A window of 32, beyond the 24 tokens that are compared in any case."""
    if cost == "cached":
        cheap(monkeypatch)
        monkeypatch.setattr(lengths_module, "MOST_TOKENS", 20)

    def longer(*arguments: Any) -> onnx.ModelProto:
        proto = build_fused(*arguments)
        for node in proto.graph.node:
            for attribute in node.attribute:
                attribute.i += attribute.name == "local_window_size"
        return proto

    model = fusable_model("mistral")
    model.config.sliding_window = 32
    monkeypatch.setattr(export_module, "build_fused", longer)
    assert not export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)["fused"]
    case = {"read": "(long beside short|read in parts)", "cached": "beyond 32"}[cost]
    assert any(f"fused {case}" for line in caplog.messages if "the fused graph is left out" in line)


def test_fused_angles_that_no_case_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch, cache=1024 * 50)
    model = fusable_model("llama3-rope")
    model.config.rope_parameters["original_max_position_embeddings"] = 110
    monkeypatch.setattr(lengths_module, "PREFILL", 40)
    export_onnx(model, byte_tokenizer(), tmp_path / "out")
    assert "first angles (110) crossed by positions alone" in str(check_onnx(tmp_path / "out", model))
    model.model.rotary_emb.inv_freq *= 1.0 + 1e-6 * torch.arange(8)
    with pytest.raises(LitBinqError, match=r"check: (the fused graph is damaged: its table of cos|position 110)"):
        check_onnx(tmp_path / "out", model)
