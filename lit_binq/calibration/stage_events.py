"""The events of a calibration that Lightning does not know: a stage begins, a stage is over."""

from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl

if TYPE_CHECKING:
    from lit_binq.calibration.module import BinQCalibration
    from lit_binq.calibration.result import StageRecord
    from lit_binq.calibration.stage import Stage


class StageEvents(Protocol):
    """What a callback may have besides Lightning's own hooks, either or both; called on every rank.

    A stage spans as many epochs of Lightning's as it takes, so `on_train_epoch_*` does not tell one from the next.
    `module.stage_index` of `module.n_stages` is the stage that begins, and after its end the one to come.
    """

    def on_stage_start(self, trainer: pl.Trainer, module: "BinQCalibration", stage: "Stage") -> None:
        """Before the closed form: `stage.title` and `stage.tuning` are there, `stage.module` is not yet."""

    def on_stage_end(self, trainer: pl.Trainer, module: "BinQCalibration", record: "StageRecord") -> None:
        """What the stage made is packed and in the student: a checkpoint may be saved."""


def announce(trainer: pl.Trainer, event: str, *args: Any) -> None:
    """Call an event of every callback that has it, in the trainer's order and under its profiler.

    Lightning calls its own hooks likewise; its function for that asks every callback to have the hook, which only its
    own ones can promise.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # as the profiler, set by the Trainer
        hook = getattr(callback, event, None)
        if callable(hook):
            with trainer.profiler.profile(f"[Callback]{callback.state_key}.{event}"):  # type: ignore[attr-defined]
                hook(trainer, trainer.lightning_module, *args)
