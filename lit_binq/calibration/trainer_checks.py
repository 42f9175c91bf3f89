"""Trainer options that the calibration cannot work with, refused by name."""

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_binq.errors import LitBinqError

LIGHTNINGS_EPOCHS = 1000
"""What a trainer says that was given no number of epochs."""


def require_trainer(trainer: pl.Trainer) -> None:
    """Refuse a trainer before anything is loaded.

    Raises:
        LitBinqError: a callback that cannot work, a strategy that shards the model, or a precision below float32
            throughout.
    """
    refuse_callbacks(trainer)
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        refuse_sharding(type(trainer.strategy).__name__, always=True)
    if str(trainer.precision).endswith("-true") and trainer.precision != "32-true":
        raise LitBinqError(
            f"trainer.precision: got {trainer.precision}, expected 32-true, bf16-mixed or 16-mixed: "
            "statistics and streams are float32"
        )


def require_no_epochs(epochs: int | None, *unset: int) -> None:
    """Refuse a number of epochs: stages have their own.

    Args:
        epochs: the trainer's `max_epochs`.
        unset: what it is if nobody set it, besides None.

    Raises:
        LitBinqError: it was set.
    """
    if epochs is not None and epochs not in unset:
        raise LitBinqError(
            f"trainer.max_epochs: got {epochs}, expected none, each stage has its own epochs: set "
            "`model.tuning.epochs` for the blocks and `model.end_to_end.epochs` for the whole model"
        )


STOPPED_BY = "stages have their own epochs, of which the best is kept: set `model.tuning.epochs`"
AVERAGED = "what is kept of a stage is its best epoch's"
SEARCHED = "each stage has its own optimizer: set the option itself"
CALLBACKS = {
    callbacks.EarlyStopping: STOPPED_BY,
    callbacks.StochasticWeightAveraging: AVERAGED,
    callbacks.WeightAveraging: AVERAGED,
    callbacks.LearningRateFinder: SEARCHED,
    callbacks.BatchSizeFinder: SEARCHED,
    callbacks.ModelPruning: "a block's parameters are not there before its stage",
    callbacks.BaseFinetuning: "a block's parameters are not there before its stage",
}
"""Callbacks that cannot work, and why."""


def refuse_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that take a fit for one training of one module.

    Raises:
        LitBinqError: names the callback and the reason.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a list, set by the Trainer
        for kind, why in CALLBACKS.items():
            if isinstance(callback, kind):
                raise LitBinqError(
                    f"trainer.callbacks: got {type(callback).__name__}, expected none of its kind: {why}"
                )


def refuse_sharding(strategy: str, *, always: bool = False) -> None:
    """Refuse strategies that shard the model, by name, before a trainer is built.

    Args:
        strategy: name of the strategy, as on the command line or of its class.
        always: refuse whatever the name.

    Raises:
        LitBinqError: the strategy cannot be used.
    """
    if always or any(word in strategy.lower() for word in ("fsdp", "deepspeed", "model_parallel", "modelparallel")):
        raise LitBinqError(
            f"trainer.strategy: got {strategy}, expected `auto` or `ddp`: strategies that shard the model set up their "
            "optimizer before a block is chosen and do not shard packed weights"
        )
