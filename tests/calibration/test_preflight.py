"""What a fit, its evaluation and the export will ask is asked before the first block, and refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import architectures
from lit_binq.calibration import block_stage
from lit_binq.calibration.preflight import checks as preflight
from lit_binq.calibration.preflight.checks import require_hidden_weights, require_tokenizer
from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq.models.blocks import find_blocks


@pytest.fixture
def begin(
    tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """begin(model, *arguments): `litbinq fit` of a model up to its first block; 9 if it gets there."""

    class FirstBlockError(Exception):
        pass

    def first_block(*_: Any, **__: Any) -> None:
        raise FirstBlockError

    monkeypatch.setattr(block_stage.BlockStage, "enter", first_block)

    def run(model: PreTrainedModel, *arguments: str) -> int:
        source = tmp_path / "model"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        text = {"path": str(text_file)}
        config = {
            "model": {"model": str(source), "packed": str(tmp_path / "packed"), "tuning": {"epochs": 1}},
            "data": {"train": text, "window_length": 48, "windows": 12, "evaluation": {"text": text}}
            | {"eval_windows": 4, "eval_length": 48},
            "checkpoint": {"dirpath": str(tmp_path / "checkpoint")},
            "trainer": {"accelerator": "cpu", "devices": 1},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        try:
            return cli.main(["fit", "--config", str(tmp_path / "config.yaml"), *arguments])
        except FirstBlockError:
            return 9

    return run


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.evaluation", '{"a": {"path": "nowhere.txt"}}'], ["data.evaluation", "'a'", "no such file"]),
        (["--data.evaluation", '{"a": {"path": "no-one/nothing"}}'], ["data.evaluation", "'a'", "cannot be loaded"]),
        (["--data.eval_length", "50000"], ["'text'", "too short", "eval_length"]),
        (["--data.eval_length", "200"], ["'text'", "128 positions", "data.eval_length"]),
    ],
)
def test_what_the_evaluation_cannot_do_is_refused_before_the_first_block(
    arguments: list[str],
    words: list[str],
    begin: Callable[..., int],
    llama: PreTrainedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert begin(llama, *arguments) == 1
    line = one_line(capsys)
    assert [w for w in words if w not in line] == []
    assert not (tmp_path / "packed").exists()
    assert begin(llama, *arguments, "--evaluate", "false") == 9


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", ["lfm2", "mamba", "recurrent_gemma"])
def test_what_the_export_cannot_carry_is_refused_unless_torch_is_enough(
    kind: str, begin: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = architectures.make(kind)
    assert begin(model) == 1
    line = one_line(capsys)
    assert "export" in line
    assert "model.preflight.torch_only: true" in line
    assert begin(model, "--model.preflight.torch_only", "true") == 9
    assert "`litbinq export` will refuse this model" in caplog.text


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", ["bloom", "falcon", "gpt_neo", "dynamic", "gemma3"])
def test_what_can_be_done_begins(kind: str, begin: Callable[..., int]) -> None:
    assert begin(architectures.make(kind)) == 9


def test_a_model_that_changes_its_weights_is_refused(
    begin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """RWKV divides its weights while it runs."""
    assert begin(architectures.make("rwkv"), "--model.preflight.torch_only", "true") == 1
    assert "changes rwkv.blocks.0.attention.output.weight while it runs" in one_line(capsys)


def test_weights_are_hidden_for_a_while_only(llama: PreTrainedModel) -> None:
    blocks = find_blocks(llama)
    before = dict(blocks.named_modules())
    assert require_hidden_weights(llama, blocks, torch.arange(8).reshape(1, -1))
    assert dict(blocks.named_modules()) == before
    blocks[1].register_forward_pre_hook(lambda block, _: block.mlp.up_proj.weight.sum() and None)
    with pytest.raises(LitBinqError, match=r"reads the weight of 1\.mlp\.up_proj"):
        assert require_hidden_weights(llama, blocks, torch.arange(8).reshape(1, -1))
    assert dict(blocks.named_modules()) == before


def test_a_tokenizer_that_cannot_be_written_again_is_refused(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require_tokenizer(tokenizer, llama) > 1000

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("the vocabulary\nis not there")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(LitBinqError, match=r"cannot be written and read again \(the vocabulary\)") as caught:
        require_tokenizer(tokenizer, llama)
    assert "\n" not in str(caught.value)


@pytest.mark.grid(1)
@pytest.mark.parametrize("what", ["host", "disk"])
def test_too_little_memory_or_disk_is_refused_with_the_option_that_goes_on(
    what: str,
    begin: Callable[..., int],
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(preflight, "host_available" if what == "host" else "free_bytes", lambda *_: 1000)
    if what == "host":
        monkeypatch.setattr(preflight, "resident", lambda: 10_000)
    assert begin(llama) == 1
    line = one_line(capsys)
    assert f"preflight: {what}" in line
    assert "GB there" in line
    assert "model.preflight.check_resources: false" in line
    assert begin(llama, "--model.preflight.check_resources", "false") == 9
    assert f"preflight: {what}" in caplog.text


def test_the_preflight_alone_prints_its_estimate_and_writes_nothing(
    begin: Callable[..., int], llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(llama, "--preflight_only") == 0
    out = capsys.readouterr().out
    for row in ("time", "host, closed form", "host, tuning", "host, evaluation", "disk, model.packed"):
        assert row in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model"]
    assert begin(llama, "--preflight_only", "true", "--data.eval_length", "200") == 1
    assert "data.eval_length" in one_line(capsys)


def test_the_estimate_stands_beside_the_measured_peak(
    make_source: Callable[..., Path], text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fitting import fit

    fit(make_source(), text_file, tmp_path / "packed")
    facts = json.loads((tmp_path / "packed" / "lit_binq.json").read_text())["facts"]
    measured, estimated = (facts[f"calibration_{kind}_memory"] for kind in ("peak", "estimated"))
    assert measured.keys() >= estimated.keys()
    # The libraries are nearly all of it, so this only says that both measure the same.
    assert 0.75 * measured["host_bytes"] < estimated["host_bytes"] < 1.25 * measured["host_bytes"]
    assert "peak memory of the fit, and its estimate: host " in caplog.text
    shutil.rmtree(tmp_path / "packed")
