"""Stage events: every callback that has them is told, in order, and of every stage."""

from typing import Any

import lightning.pytorch as pl

from fitting import fit
from lit_binq.calibration.stage_events import announce


class Listen(pl.Callback):
    """Keeps what it is told; Lightning's own epochs beside, which are more."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.epochs = 0

    def on_stage_start(self, trainer, module, stage) -> None:
        self.told.append(("start", stage.title, module.stage_index, hasattr(stage, "module")))

    def on_stage_end(self, trainer, module, record) -> None:
        path = next(c.path for c in trainer.callbacks if type(c).__name__ == "StageCheckpoint")
        self.told.append(("end", record.title, module.stage_index, path.exists()))

    def on_train_epoch_end(self, trainer, module) -> None:
        self.epochs += 1


class OnlyEnds(pl.Callback):
    """Has one of the two."""

    def __init__(self) -> None:
        self.ends = 0

    def on_stage_end(self, trainer, module, record) -> None:
        self.ends += 1


def test_callbacks_are_told_of_stages(make_source, text_file, tmp_path):
    listen, ends = Listen(), OnlyEnds()
    fit(make_source(blocks=2), text_file, tmp_path / "packed", callbacks=[listen, ends])
    # Lightning moves checkpoint callbacks to the end: the first stage ends before its checkpoint is there.
    assert listen.told == [
        ("start", "block 0", 0, False),
        ("end", "block 0", 1, False),
        ("start", "block 1", 1, False),
        ("end", "block 1", 2, True),
        ("start", "model", 2, False),
        ("end", "model", 3, True),
    ]
    assert ends.ends == 3
    assert listen.epochs == 5


def test_an_event_that_nobody_wants_is_no_error():
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    announce(trainer, "on_stage_start", object())
