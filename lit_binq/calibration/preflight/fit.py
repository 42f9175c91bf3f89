"""The preflight of a fit as its trainer, its data module and its options describe it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from transformers import PreTrainedModel

from lit_binq.calibration.checkpoint import StageCheckpoint
from lit_binq.calibration.preflight.checks import Asked, Report, preflight, require_resources
from lit_binq.calibration.preflight.estimates import Run
from lit_binq.calibration.workspace import require_storable
from lit_binq.hub.config import require_kept_configuration
from lit_binq.models.blocks import find_blocks

if TYPE_CHECKING:
    from lit_binq.calibration.module import BinQCalibration


def ask_before_fit(
    module: "BinQCalibration", trainer: pl.Trainer, data: Any, model: PreTrainedModel, show: Callable[[Report], None]
) -> Report:
    """Ask everything; see `lit_binq.calibration.preflight.checks`.

    Args:
        module: its options say what will be done.
        trainer: its strategy says where.
        data: the data module, set up for the fit, its evaluation sets loaded where they are to be measured.
        model: the full-precision model, loaded.
        show: is given what was found before it is compared with what memory and disk there is.

    Raises:
        LitBinqError: something cannot work.
    """
    require_kept_configuration(model)
    require_storable(model, find_blocks(model), module.unquantized_dtype)
    device = trainer.strategy.root_device
    train = len(data.train_windows)
    sets = data.evaluation_windows if module.evaluates else None
    run = Run(
        device=device,
        windows=(train + len(data.held_out_windows), data.window_length),
        batch=min(data.batch_size, train),
        train=train,
        streams=module.stream_options,
        closed_form=module.closed_form,
        tuning=module.tuning,
        end_to_end=module.end_to_end,
        autocast=_autocast(str(trainer.precision)),
        ranks=trainer.world_size,
        unquantized_bytes=module.unquantized_dtype.itemsize,
        evaluation=(data.eval_batch_size, data.eval_length) if sets else None,
        compare_fp=module.compare_fp,
        graphs=module.cuda_graphs and trainer.world_size == 1,
        free=int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0,
    )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a list, set by the Trainer
    folders = [c.path.parent for c in callbacks if isinstance(c, StageCheckpoint)]
    asked = Asked(
        model=model,
        tokenizer=data.load_tokenizer(),
        window=data.train_windows[:1],
        run=run,
        evaluation=sets,
        packed=module.packed,
        checkpoint=folders[0] if folders else None,
        cache=Path(module.stream_options.cache_dir or tempfile.gettempdir()),
    )
    report = preflight(asked, module.preflight)
    show(report)
    require_resources(report, run, refuse=module.preflight.check_resources)
    return report


def _autocast(precision: str) -> torch.dtype | None:
    """The dtype of Lightning's mixed precision."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
