"""Checkpoints at stage boundaries, and what must be the same for one to be resumed."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.models.ties import distinct_state
from lit_binq.utils import stopping
from lit_binq.utils.files import replacing


class WholeFile(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has it on the disk, then renames it.

    Lightning's own way goes through memory and the system's temporary folder, then copies: a process that is killed
    leaves half a checkpoint behind, and a small temporary folder ends the fit.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file. Raises OSError if it cannot be written; what stood there then still does."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part, part.open("wb") as file:
            sink = _Sink(file)
            torch.save(checkpoint, cast(IO[bytes], sink))
            if sink.error is not None:
                raise sink.error


class _Sink:
    """A file for torch.save, which makes RuntimeErrors and worse of an OSError: the first one is kept instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""


class StageCheckpoint(Checkpoint):
    """Writes a checkpoint at every stage boundary, keeping the last one.

    Resume with `--ckpt_path DIRPATH/last.ckpt`.

    Args:
        dirpath: folder of the checkpoint.

    Attributes:
        path: the file.
        saved: whether this run has written it.
    """

    def __init__(self, dirpath: str = "checkpoints") -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.saved = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints written whole, unless the user chose another way of writing them."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFile()

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: object) -> None:
        """Write the checkpoint; see lit_binq.calibration.stage_events."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint. Called on every rank."""
        try:
            with stopping.whole():
                trainer.save_checkpoint(self.path)
                self.saved = True
        except OSError as error:
            raise LitBinqError(
                f"checkpoint.dirpath: {str(self.path)!r} cannot be written ({error.strerror}); "
                "expected a writable folder with room for it"
            ) from error


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model: its configuration, and name, dtype, shape and every byte of each tensor it stores.

    A fine-tune may share any part of its tensors with another model. Reads about 1 GB a second on each core.
    """
    tensors, tied = distinct_state(model)

    def of(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    whole = hashlib.sha256(model.config.to_json_string().encode() + json.dumps(tied, sort_keys=True).encode())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets other threads run
        for part in pool.map(of, tensors):
            whole.update(part)
    return whole.hexdigest()[:16]


def identity(model: str, data: str, options: dict[str, Any]) -> dict[str, str]:
    """What must be the same for a checkpoint to be resumed: model, data and options.

    Args:
        model: fingerprint of the full-precision model.
        data: fingerprint of the calibration windows.
        options: everything else that changes the result; kept readable.
    """
    return {"model": model, "data": data, "options": json.dumps(options, sort_keys=True)}


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
