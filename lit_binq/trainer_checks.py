"""Trainer options that the calibration cannot work with, refused by name.

May touch: Lightning's trainer and strategies.
"""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_binq.errors import LitBinqError

LIGHTNINGS_EPOCHS = 1000
"""What a trainer says that was given no number of epochs."""


def require_trainer(trainer: pl.Trainer) -> None:
    """Refuse a trainer before anything is loaded.

    Raises:
        LitBinqError: a strategy that shards the model, or a precision below float32 throughout.
    """
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
            "`model.tuning.epochs` for the blocks and `model.finish.epochs` for the whole model"
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
