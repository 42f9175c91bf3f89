"""Perplexity of a packed model beside its full-precision source: `litbinq validate` and `litbinq test`."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.evaluation.perplexity import TokenPerplexity
from lit_binq.formats.activations import FULL_BITS
from lit_binq.formats.manifest import read_manifest
from lit_binq.hub.bits import activation_bits, file_bits, how_counted, true_bits
from lit_binq.hub.save_load import load_packed
from lit_binq.models.blocks import move, require_fitting
from lit_binq.models.kv_cache import kv_bits
from lit_binq.models.load import check_patterns, load_model
from lit_binq.utils import stopping
from lit_binq.utils.processes import requeued

log = logging.getLogger(__name__)


@contextmanager
def highest_precision() -> Iterator[None]:
    """Full float32 products inside, whatever the option `matmul_precision` says; statistics need them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def table(windows: list[tuple[Any, ...]]) -> str:
    """CSV of `PackedEvaluation.window_perplexities`, with a header."""
    head = ("set", "window", "packed", "fp")[: len(windows[0]) if windows else 2]
    return "".join(",".join(map(str, row)) + "\n" for row in (head, *windows))


class PackedEvaluation(pl.LightningModule):
    """Evaluates a packed folder; the calibration module builds on it.

    Args:
        model: the full-precision source.
        packed: the packed folder.
        compare_fp: measure the source as well.
        revision: branch, tag or commit of a hub model.
        drop_tensors: names, or regular expressions matched anywhere in them, of tensors of the source that may be left
            out although its architecture does not take them; such a checkpoint is refused otherwise.

    Attributes:
        results: perplexities by evaluation set and model, after `validate` or `test`.
        window_perplexities: after `predict`, (set, window, packed) or (set, window, packed, full precision).
    """

    def __init__(
        self,
        model: str,
        packed: str,
        compare_fp: bool = True,
        revision: str | None = None,
        drop_tensors: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_patterns(drop_tensors)
        self.drop_tensors = list(drop_tensors)
        self.source, self.packed, self.compare_fp, self.revision = model, Path(packed), compare_fp, revision
        self.results: dict[str, dict[str, float]] = {}
        self._metrics: dict[str, TokenPerplexity] = {}
        self.window_perplexities: list[tuple[Any, ...]] = []
        # Big models stay out of the module registry, so that nobody moves, saves or wraps them.
        self._outside: dict[str, Any] = {}

    @property
    def datamodule(self) -> Any:
        """The trainer's data module, or None; Lightning sets it while it runs and does not declare it."""
        return getattr(self.trainer, "datamodule", None)

    def configure_model(self) -> None:
        """Load the packed model and, if asked for, its source."""
        if "student" in self._outside:
            return
        device = self.trainer.strategy.root_device
        self._outside["student"] = move(load_packed(self.packed)[0], device)
        if self.compare_fp:
            self._outside["teacher"] = move(self.load_source(), device)

    def load_source(self) -> PreTrainedModel:
        """The full-precision model; see `lit_binq.models.load.load_model` for the errors."""
        return load_model(self.source, revision=self.revision, drop_tensors=self.drop_tensors)

    def release(self) -> None:
        """Forget the models of the fit, so that evaluation has the memory and reads what was written."""
        self._outside.clear()

    def summary(self) -> dict[str, Any]:
        """Perplexities by evaluation set, with the bits of the packed model they belong to and facts of its fit."""
        student = self._outside["student"]
        facts = read_manifest(self.packed)["facts"]
        return {
            "model": self.source,
            "packed": str(self.packed),
            "true_bits": true_bits(student),
            "file_bits": file_bits(self.packed),
            "activation_bits": activation_bits(student),
            "kv_bits": kv_bits(student) or FULL_BITS,
            "perplexity": self.results,
            "data": self.datamodule.describe(),
            **{k: v for k, v in facts.items() if k.startswith("calibration_") or k in ("device", "versions")},
        }

    def answer_signals(self) -> None:
        """Take SIGTERM back from Lightning, whose handler only makes a note, and blocks under DDP."""
        if not requeued(self.trainer):
            stopping.take_back()

    def on_validation_start(self) -> None:
        """Fresh metrics, one for each evaluation set and model."""
        self.answer_signals()
        names = self.datamodule.eval_names
        models = ["packed"] + ["fp"] * ("teacher" in self._outside)
        for loader in self.datamodule.val_dataloader():
            require_fitting(self._outside["student"], loader.dataset.windows, "data.eval_length")
        self._metrics = {f"{m}/{n}": TokenPerplexity().to(self.device) for n in names for m in models}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Next-token loss of the packed (and the full-precision) model on windows (b, T)."""
        name = self.datamodule.eval_names[dataloader_idx]
        ids = batch["input_ids"]
        # Perplexities are float32 whatever precision the tuning ran in.
        with highest_precision(), torch.autocast(self.device.type, enabled=False):
            self._measure(name, ids)

    def _measure(self, name: str, ids: Tensor) -> None:
        for kind, key in (("packed", "student"), ("fp", "teacher")):
            if key in self._outside:
                self._metrics[f"{kind}/{name}"].update(self._outside[key](input_ids=ids, use_cache=False).logits, ids)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexities and print them beside the true bits.

        Raises:
            LitBinqError: a perplexity is no number. An infinite one is: a model may be that sure of something else.
        """
        for key, metric in self._metrics.items():
            kind, name = key.split("/", 1)
            value = float(metric.compute())
            if math.isnan(value):
                which, option = (self.packed, "packed") if kind == "packed" else (self.source, "model")
                raise LitBinqError(
                    f"perplexity of {str(which)!r} on {name}: got NaN, expected a number: the model's logits are no "
                    f"numbers, the files of the option `{option}` are damaged"
                )
            self.results.setdefault(name, {})[kind] = value
            # The metric is summed over ranks already; `sync_dist` beside `rank_zero_only` only keeps Lightning quiet.
            self.log(f"ppl_{kind}/{name}", value, rank_zero_only=True, sync_dist=True)
        student = self._outside["student"]
        if self.trainer.is_global_zero:
            log.info(
                "%.3f true bits in the blocks%s, %.2f file bits, inputs of %.2f bits, keys and values of %d",
                true_bits(student),
                how_counted(student),
                file_bits(self.packed),
                activation_bits(student),
                kv_bits(student) or FULL_BITS,
            )
            for name, values in self.results.items():
                fp = values.get("fp")
                beside = f", full precision {fp:.2f}, ratio {values['packed'] / fp:.2f}" if fp is not None else ""
                log.info("perplexity on %s: %.2f%s", name, values["packed"], beside)

    def on_predict_start(self) -> None:
        """No windows yet."""
        self.on_validation_start()
        self.window_perplexities = []

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Perplexity of each window of a batch (b, T): (b, 1), or (b, 2) with the full-precision model's behind it."""
        name, ids = self.datamodule.eval_names[dataloader_idx], batch["input_ids"]
        columns = []
        with highest_precision(), torch.autocast(self.device.type, enabled=False):
            for key in ("student", "teacher"):
                if key in self._outside:
                    logits = self._outside[key](input_ids=ids, use_cache=False).logits
                    values = []
                    for window, tokens in zip(logits, ids, strict=True):
                        metric = TokenPerplexity(sync_on_compute=False).to(self.device)
                        metric.update(window[None], tokens[None])
                        values.append(metric.compute())
                    columns.append(torch.stack(values))
        rows = torch.stack(columns, 1)
        # Window i of this rank is window rank + i * ranks of its set.
        first = sum(name == row[0] for row in self.window_perplexities)
        self.window_perplexities += [
            (name, self.trainer.global_rank + (first + i) * self.trainer.world_size, *row.tolist())
            for i, row in enumerate(rows)
        ]
        return rows

    def on_predict_end(self) -> None:
        """Every rank has the windows of all."""
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.window_perplexities)
            names = self.datamodule.eval_names
            self.window_perplexities = sorted((r for p in parts for r in p), key=lambda r: (names.index(r[0]), r[1]))

    on_test_start, test_step = on_validation_start, validation_step
    on_test_epoch_end = on_validation_epoch_end
