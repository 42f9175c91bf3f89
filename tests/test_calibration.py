"""The whole calibration on tiny models: one fit, resumed, on two processes, and with input that cannot work."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from lit_binq.calibration import BinQCalibration
from lit_binq.checkpoint import StageCheckpoint
from lit_binq.data import CalibrationData, TextSource
from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq.hub import load_packed, packed_linears, read_marker, true_bits
from lit_binq.stages import ClosedForm, Tuning

T = 48  # tokens a window


@pytest.fixture
def make_source(tmp_path, tokenizer):
    """Write a tiny checkpoint of an architecture and return its folder."""

    def make(kind: str = "llama", **options) -> Path:
        folder = tmp_path / f"{kind}-model"
        tiny_model(kind, **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def make_data(source: Path, text: Path, **options) -> CalibrationData:
    settings = {"window_length": T, "windows": 20, "held_out": 0.2, "batch_size": 4} | options
    evaluation = {"text": TextSource(str(text))}
    return CalibrationData(
        str(source), train=TextSource(str(text)), evaluation=evaluation, eval_windows=4, eval_length=T, **settings
    )


def make_trainer(**options) -> pl.Trainer:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": -1, "num_sanity_val_steps": 0}
    return pl.Trainer(**settings | options, enable_progress_bar=False, enable_model_summary=False)


def fit(source: Path, text: Path, packed: Path, *, ckpt_path=None, callbacks=(), data=None, trainer=None, **options):
    """Run a fit; by default two epochs a block and one of the whole model."""
    settings = {
        "tuning": Tuning(epochs=2, patience=0),
        "finish": Tuning(epochs=1, lr_codes=0.02, patience=0),
    } | options
    module = BinQCalibration(str(source), packed=str(packed), **settings)
    trainer = make_trainer(callbacks=[*callbacks, StageCheckpoint(str(packed) + "-ckpt")], **(trainer or {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eval mode.*")  # calibration runs in evaluation mode on purpose
        trainer.fit(module, make_data(source, text, **(data or {})), ckpt_path=ckpt_path)
    return module


def stored(packed: Path) -> dict[str, torch.Tensor]:
    return load_file(packed / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    first, second = stored(a), stored(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class KeepEach(StageCheckpoint):
    """Keeps the checkpoint of every stage boundary."""

    def save(self, trainer: pl.Trainer) -> None:
        super().save(trainer)
        stage = trainer.lightning_module.stage_index
        shutil.copy(self.path, self.path.with_name(f"stage-{stage}.ckpt"))


class Remember(pl.Callback):
    """Keeps the student's logits of the fit, and each rank's digest of its codes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.logits = folder, None

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, module: BinQCalibration) -> None:
        self.logits = module.work.student(input_ids=torch.arange(24).reshape(1, -1)).logits
        if self.folder is not None:
            digest = hashlib.sha256()
            for _, layer in sorted(packed_linears(module.work.student).items()):
                for tensor in layer.weight_buffers().values():
                    digest.update(tensor.cpu().numpy().tobytes())
            (self.folder / f"rank-{trainer.global_rank}").write_text(digest.hexdigest())


def test_one_fit_gives_a_packed_model_that_reloads_bit_for_bit(any_model, tokenizer, text_file, tmp_path):
    source = tmp_path / "model"
    any_model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    remember = Remember()
    module = fit(source, text_file, tmp_path / "packed", callbacks=[remember])
    assert [r.title for r in module.records] == ["block 0", "block 1", "model"]
    model, _ = load_packed(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
    linears = sum(isinstance(m, torch.nn.Linear) for m in any_model.modules()) - 1  # all but the head
    assert len(packed_linears(model)) == linears
    tensors = stored(tmp_path / "packed")
    parts = ("codes", "row_scale", "col_scale")
    bits = sum(8 * t.numel() * t.element_size() for n, t in tensors.items() if n.endswith(parts))
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    assert true_bits(model) == pytest.approx(bits / weights, abs=1e-12)
    facts = read_marker(tmp_path / "packed")["facts"]
    assert facts["calibration_tokens"] == 16 * T
    assert len(facts["stages"]) == 3


def test_tuning_lowers_the_held_out_loss(make_source, text_file, tmp_path):
    tuning = Tuning(epochs=12, lr_codes=0.03, patience=0)
    module = fit(make_source(), text_file, tmp_path / "packed", tuning=tuning)
    assert all(r.after <= r.before for r in module.records)
    assert sum(r.after < r.before for r in module.records) >= 2


def test_early_stopping_keeps_at_least_the_closed_form(make_source, text_file, tmp_path):
    source = make_source()
    wild = Tuning(epochs=6, lr_codes=5.0, lr_scales=3.0, lr_norms=3.0, patience=2)
    module = fit(source, text_file, tmp_path / "wild", tuning=wild, finish=Tuning(epochs=0))
    fit(source, text_file, tmp_path / "closed", tuning=Tuning(epochs=0), finish=Tuning(epochs=0))
    assert [(r.best_epoch, r.epochs) for r in module.records] == [(0, 2), (0, 2)]
    assert_same(tmp_path / "wild", tmp_path / "closed")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_at_a_stage_boundary_gives_the_same_bits(stage, make_source, text_file, tmp_path):
    source = make_source("opt")  # dropout, biases and LayerNorm
    keep = KeepEach(str(tmp_path / "kept"))
    fit(source, text_file, tmp_path / "whole", callbacks=[keep])
    resumed = fit(source, text_file, tmp_path / "resumed", ckpt_path=tmp_path / "kept" / f"stage-{stage}.ckpt")
    assert [r.stage for r in resumed.records] == [0, 1, 2]
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_a_checkpoint_of_another_run_is_refused(make_source, text_file, tmp_path):
    source = make_source()
    fit(source, text_file, tmp_path / "one")
    last = tmp_path / "one-ckpt" / "last.ckpt"
    with pytest.raises(LitBinqError, match="another options"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last, closed_form=ClosedForm(shrinkage=0.3))
    with pytest.raises(LitBinqError, match="another data"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last, data={"windows": 16})
    tiny_model("llama", seed=5).save_pretrained(source)
    with pytest.raises(LitBinqError, match="another model"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last)
    assert not (tmp_path / "two").exists()


def test_without_held_out_windows_the_training_loss_decides(make_source, text_file, tmp_path):
    module = fit(make_source(), text_file, tmp_path / "packed", data={"held_out": 0.0})
    assert len(module.records) == 3


def test_the_disk_cache_gives_the_same_bits(make_source, text_file, tmp_path):
    from lit_binq.streams import StreamOptions

    source = make_source("qwen2")
    fit(source, text_file, tmp_path / "host")
    disk = StreamOptions(cache="disk", cache_dir=str(tmp_path), batch_windows=8)
    fit(source, text_file, tmp_path / "disk", streams=disk)
    assert_same(tmp_path / "host", tmp_path / "disk")
    assert not list(tmp_path.glob("litbinq-streams-*"))


def test_two_processes_hold_identical_codes(make_source, text_file, tmp_path):
    source = make_source()
    closed = {"tuning": Tuning(epochs=0), "finish": Tuning(epochs=0)}
    two = {"devices": 2, "strategy": "ddp_spawn"}
    for name, options in (("closed", closed), ("tuned", {})):
        folder = tmp_path / name
        folder.mkdir()
        fit(source, text_file, tmp_path / f"two-{name}", callbacks=[Remember(folder)], trainer=two, **options)
        assert (folder / "rank-0").read_text() == (folder / "rank-1").read_text()
    # Statistics are summed over ranks: the closed form is the one of a single process, but for rounding.
    fit(source, text_file, tmp_path / "one", data={"windows": 20}, **closed)
    one, both = load_packed(tmp_path / "one")[0], load_packed(tmp_path / "two-closed")[0]
    pairs = zip(packed_linears(one).values(), packed_linears(both).values(), strict=True)
    same = [float((a.solution().B == b.solution().B).float().mean()) for a, b in pairs]
    assert min(same) > 0.97


def test_validation_reports_both_models(make_source, text_file, tmp_path):
    source = make_source()
    fit(source, text_file, tmp_path / "packed")
    module = BinQCalibration(str(source), packed=str(tmp_path / "packed"))
    make_trainer().validate(module, make_data(source, text_file), verbose=False)
    assert module.results["text"].keys() == {"packed", "fp"}
    summary = module.summary()
    assert summary["perplexity"]["text"]["fp"] > 1
    json.dumps(summary)


def test_a_sharding_strategy_is_refused_by_name():
    from lit_binq.calibration import refuse_sharding

    for name in ("fsdp", "FSDPStrategy", "deepspeed_stage_3", "ModelParallelStrategy"):
        with pytest.raises(LitBinqError, match="expected `auto` or `ddp`"):
            refuse_sharding(name)
    for name in ("auto", "ddp", "ddp_spawn"):
        refuse_sharding(name)


def test_nothing_is_left_behind_when_a_stage_fails(make_source, text_file, tmp_path, monkeypatch):
    source = make_source()
    monkeypatch.setattr("lit_binq.formats.row_column.RowColumn.balanced", lambda s: type(s)(s.r / 0, s.c, s.B))
    with pytest.raises(LitBinqError, match=r"float16 cannot hold|finite"):
        fit(source, text_file, tmp_path / "packed", tuning=Tuning(epochs=0))
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".packed*"))
