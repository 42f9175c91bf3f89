"""Checkpoints at stage boundaries, and what must be the same for one to be resumed.

May touch: Lightning's callback, nothing of the calibration but its stage number.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError


class StageCheckpoint(Checkpoint):
    """Writes a checkpoint at every stage boundary, keeping the last one.

    Resume with `--ckpt_path DIRPATH/last.ckpt`.

    Args:
        dirpath: folder of the checkpoint.
    """

    def __init__(self, dirpath: str = "checkpoints") -> None:
        self.path = Path(dirpath) / "last.ckpt"

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint under a temporary name, then rename it. Called on every rank."""
        part = self.path.with_suffix(".part")
        try:
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                part.replace(self.path)
        except OSError as error:
            raise LitBinqError(
                f"checkpoint.dirpath: {str(self.path)!r} cannot be written ({error.strerror}); "
                "expected a writable folder"
            ) from error


def identity(model: PreTrainedModel, data: str, options: dict[str, Any]) -> dict[str, str]:
    """What must be the same for a checkpoint to be resumed: model, data and options.

    Args:
        model: the full-precision model; its configuration and the first values of each parameter are hashed.
        data: fingerprint of the calibration windows.
        options: everything else that changes the result; kept readable.
    """
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return {"model": digest.hexdigest()[:16], "data": data, "options": json.dumps(options, sort_keys=True)}


def require_same(saved: dict[str, str], mine: dict[str, str]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        LitBinqError: names the first part that differs.
    """
    for part, value in mine.items():
        if saved.get(part) != value:
            raise LitBinqError(
                f"ckpt_path: the checkpoint was made with another {part} ({saved.get(part)}), expected {value}: "
                "use the same configuration, or start without --ckpt_path"
            )
