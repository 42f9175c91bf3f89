"""The progress bar: which stage of how many, how far it is, and how long the blocks will take."""

import logging
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

if TYPE_CHECKING:
    from lit_binq.calibration.result import StageRecord
    from lit_binq.calibration.stage import Stage

WIDTH = 20
"""Of the bar, in characters."""
INTERVAL = 0.1
"""Seconds between two pictures at least."""


class StageProgress(ProgressBar):
    """One line at the bottom of a terminal, on standard error; nothing where that is none, as in a log file.

    Lightning's own bars count epochs, of which a calibration has as many as its stages take. Lines that are logged
    meanwhile stand above it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._on, self._shown, self._drawn = True, False, 0.0
        self._handlers: list[logging.Handler] = []
        self._title, self._began, self._seconds = "", 0.0, list[float]()

    def disable(self) -> None:
        """Say nothing from now on: Lightning calls it on every rank but the first."""
        self._on = False

    def enable(self) -> None:
        """Speak again."""
        self._on = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make room for lines of the log."""
        super().setup(trainer, pl_module, stage)
        if not self._handlers:
            self._handlers = list(logging.getLogger().handlers)
            for handler in self._handlers:
                handler.addFilter(self._clear)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the line empty."""
        self._clear()
        for handler in self._handlers:
            handler.removeFilter(self._clear)
        self._handlers = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same."""
        self.teardown(trainer, pl_module, "")

    # ---- fit --------------------------------------------------------------------------------------------------

    def on_stage_start(self, trainer: pl.Trainer, module: Any, stage: "Stage") -> None:
        """The closed form begins."""
        blocks = len(module.work.blocks)
        i = module.stage_index
        self._title = f"block {i + 1} of {blocks}" if i < blocks else "model"
        self._epochs = stage.tuning.epochs
        self._place, self._stages, self._blocks = i, module.n_stages, blocks
        self._began, self._drawn = time.monotonic(), 0.0
        self._draw(0.0, "closed form" if i < blocks else "teacher")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        epoch = getattr(getattr(pl_module, "_kept", None), "epoch", 0)
        batches = max(int(trainer.num_training_batches), 1)
        share = (epoch + (batch_idx + 1) / batches) / max(self._epochs, 1)
        self._draw(share, f"epoch {epoch + 1} of {self._epochs}")

    def on_stage_end(self, trainer: pl.Trainer, module: Any, record: "StageRecord") -> None:
        """A stage is over."""
        self._seconds.append(record.seconds)
        self._clear()

    def _draw(self, share: float, what: str) -> None:
        """The bar, `share` of the stage being done."""
        left = ""
        if self._place < self._blocks and self._seconds:
            each = sum(self._seconds) / len(self._seconds)
            seconds = int(max(each * (self._blocks - self._place) - (time.monotonic() - self._began), 0))
            left = f", {seconds // 60}:{seconds % 60:02d} left"
            left += " + model stage" if self._stages > self._blocks else ""
        self._line((self._place + share) / self._stages, f"{self._title}, {what}{left}")

    # ---- validate, test and predict ---------------------------------------------------------------------------

    def _evaluated(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *at: int) -> None:
        place = at[0] if at else 0
        names = module.datamodule.eval_names
        batches = len(module.datamodule.val_dataloader()[place])
        self._line(
            (place + (batch_idx + 1) / batches) / len(names),
            f"perplexity on {names[place]}, batch {batch_idx + 1} of {batches}",
        )

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluated  # type: ignore[assignment]

    # ---- the line ---------------------------------------------------------------------------------------------

    def _line(self, share: float, text: str) -> None:
        if not self._on or not sys.stderr.isatty() or time.monotonic() - self._drawn < INTERVAL:
            return
        done = int(share * WIDTH)
        line = f"[{'#' * done}{'.' * (WIDTH - done)}] {text}"[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(f"\r{line}\x1b[K")
        sys.stderr.flush()
        self._shown, self._drawn = True, time.monotonic()

    def _clear(self, record: logging.LogRecord | None = None) -> bool:
        """Empty the line, before a logged one if `record` is given, which it lets pass."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
        return True
