"""Whole fits of tiny models, for the tests that need one."""

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file

from lit_binq.calibration.checkpoint import StageCheckpoint
from lit_binq.calibration.module import BinQCalibration
from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.data.module import CalibrationData, TextSource
from lit_binq.formats.registry import packed_linears

T = 48
"""Tokens a window."""


def make_data(source: Path, text: Path, **options: Any) -> CalibrationData:
    """20 windows, 4 of them held out, in batches of 4."""
    settings = {"window_length": T, "windows": 20, "held_out": 0.2, "batch_size": 4} | options
    evaluation = {"text": TextSource(str(text))}
    return CalibrationData(
        str(source), train=TextSource(str(text)), evaluation=evaluation, eval_windows=4, eval_length=T, **settings
    )


def make_trainer(**options: Any) -> pl.Trainer:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": -1, "num_sanity_val_steps": 0}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**settings | options)


def two_processes() -> dict[str, Any]:
    """Trainer options. Forked processes need not import everything again, which takes ten times as long as the fit."""
    return {"devices": 2, "strategy": "ddp_spawn" if torch.cuda.is_initialized() else "ddp_fork"}


def fit(
    source: Path,
    text: Path,
    packed: Path,
    *,
    ckpt_path: Path | None = None,
    callbacks: tuple[pl.Callback, ...] | list[pl.Callback] = (),
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> BinQCalibration:
    """Run a fit; by default two epochs a block and one of the whole model."""
    settings = {
        "tuning": BlockTuning(epochs=2),
        "end_to_end": ModelTuning(epochs=1, lr_codes=0.02),
    } | options
    module = BinQCalibration(str(source), packed=str(packed), **settings)
    made = make_trainer(callbacks=[*callbacks, StageCheckpoint(str(packed) + "-ckpt")], **(trainer or {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eval mode.*")  # calibration runs in evaluation mode on purpose
        made.fit(module, make_data(source, text, **(data or {})), ckpt_path=ckpt_path)
    return module


def stored(packed: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a packed folder."""
    return load_file(packed / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    """Two packed folders hold the same bits."""
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
    """Keeps the student's logits of the fit, and each rank's digest of its packed weights."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.logits: torch.Tensor

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, module: BinQCalibration) -> None:
        self.logits = module.work.student(input_ids=torch.arange(24).reshape(1, -1)).logits
        if self.folder is not None:
            digest = hashlib.sha256()
            for _, layer in sorted(packed_linears(module.work.student).items()):
                for tensor in layer.weight_buffers().values():
                    digest.update(tensor.cpu().numpy().tobytes())
            (self.folder / f"rank-{trainer.global_rank}").write_text(digest.hexdigest())
