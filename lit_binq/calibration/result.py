"""What a fit hands over: one line of progress a stage, the packed folder with its facts, the diagnostics."""

import dataclasses
import logging
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from torch import Tensor

from lit_binq.calibration.preflight.estimates import known
from lit_binq.calibration.workspace import Workspace
from lit_binq.errors import LitBinqError
from lit_binq.hub.bits import dense_weights, file_bits, how_counted, true_bits
from lit_binq.hub.save_load import save_packed
from lit_binq.models.load import load_tokenizer
from lit_binq.utils.json_records import DIAGNOSTICS, BlockMeasures, read_diagnostics, write_diagnostics
from lit_binq.utils.memory import peak_memory

log = logging.getLogger(__name__)

CHECKED_PRODUCTS = 2 * 10**10
"""Tokens times weights of the logits that end a fit: seconds on a few cores, since every weight is unpacked anyway."""


@dataclass
class StageRecord:
    """What one finished stage reports.

    Attributes:
        stage: number, from 0.
        title: `block i` or `model`.
        before: loss of the closed form (of the packed blocks, for the model stage) on held-out windows, or on the
            training windows where none are held out.
        after: the same after tuning.
        epochs: tuning epochs that ran.
        best_epoch: the epoch that was kept; 0 is the closed form.
        seconds: wall time.
        activation_bits: of the inputs of each linear layer, averaged over its columns, where they are quantized.
    """

    stage: int
    title: str
    before: float
    after: float
    epochs: int
    best_epoch: int
    seconds: float
    activation_bits: dict[str, float] = field(default_factory=dict)


def log_progress(records: list[StageRecord], work: Workspace, stages: int) -> None:
    """One line about the last stage: stage i/n, loss before and after, true bits so far, time left for blocks.

    Args:
        records: the stages that are done, at least one.
        work: the workspace; the student's blocks say how many stages are block stages.
        stages: how many there are in all.
    """
    record, done, blocks = records[-1], len(records), len(work.blocks)
    times = [r.seconds for r in records[:blocks]]
    left = int(sum(times) / len(times) * max(blocks - done, 0))
    log.info(
        "stage %d/%d %-8s loss %.4f -> %.4f (epoch %d of %d), %.3f true bits, %.1f s, %s left%s",
        record.stage + 1,
        stages,
        record.title,
        record.before,
        record.after,
        record.best_epoch,
        record.epochs,
        true_bits(work.student, work.blocks[:done]),
        record.seconds,
        f"{left // 60}:{left % 60:02d}",
        " + model stage" if done < stages and stages > blocks else "",
    )


@dataclass
class FitFacts:
    """Facts of a run that its packed folder keeps.

    Attributes:
        source: the full-precision model.
        revision: branch, tag or commit of a hub model.
        data: rules and fingerprint of the calibration windows.
        tokens: calibration tokens of all ranks, held-out ones not counted.
        identity: what a checkpoint of this run must match (lit_binq.calibration.checkpoint).
        estimated: peak memory as it was estimated before the first block, with the keys of the measured one.
    """

    source: str
    revision: str | None
    data: dict[str, Any]
    tokens: int
    identity: dict[str, str]
    estimated: dict[str, int | None]


def write_result(
    folder: Path,
    work: Workspace,
    run: FitFacts,
    records: list[StageRecord],
    measures: list[BlockMeasures],
    seconds: float,
) -> None:
    """Write the packed folder with every fact of the run, and the diagnostics of its blocks if there are any.

    The student moves to the host. Called on the first rank only.

    Args:
        folder: the packed folder.
        work: the workspace, every block packed.
        run: facts known from the beginning.
        records: all stages.
        measures: diagnostics, empty if none were asked for.
        seconds: wall time of the fit.

    Raises:
        LitBinqError: see `save_packed`; nothing is left behind then. What was written is read again, and must give
            the student's logits bit for bit.
    """
    peak = peak_memory(work.device)
    facts = {
        "source": run.source,
        "data": run.data,
        "calibration_tokens": run.tokens,
        "calibration_seconds": round(seconds, 1),
        "calibration_peak_memory": peak,
        "calibration_estimated_memory": run.estimated,
        "device": _device_name(work.device),
        "identity": run.identity,
        "stages": [dataclasses.asdict(r) for r in records],
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "transformers": transformers.__version__,
        },
    }
    tokenizer = load_tokenizer(run.source, revision=run.revision)
    student = work.student.cpu()
    windows = _few(work.streams.windows, dense_weights(student))
    save_packed(student, tokenizer, folder, facts=facts, unquantized_dtype=work.unquantized_dtype, windows=windows)
    path = diagnostics_path(folder)
    if measures:
        write_diagnostics(path, measures)
    else:
        _remove_older(path)
    log.info(
        "peak memory of the fit, and its estimate: host %s (%s), device %s (%s)",
        *(known(m[key]) for key in ("host_bytes", "device_bytes") for m in (peak, run.estimated)),
    )
    log.info(
        "wrote %s: %.3f true bits%s, %.2f file bits, calibrated on %d tokens in %.0f s",
        folder,
        true_bits(work.student),
        how_counted(work.student),
        file_bits(folder),
        run.tokens,
        seconds,
    )


def _few(windows: Tensor, weights: int) -> Tensor:
    """The first two of windows (n, T), cut so that a pass over them takes the host seconds for any model's weights."""
    return windows[:2, : max(CHECKED_PRODUCTS // (2 * weights), 16)]


def beside(packed: Path, name: str) -> Path:
    """Where something of a run is: beside a packed folder named `packed`, as the folder around it is the run's own.

    A folder around a packed folder of another name may hold other runs: files are inside that one then, where
    lit_binq.report.runs reads them, and the folder of logs, which grows while that one is not there yet, has its name.
    """
    packed = packed.resolve()
    if packed.name == "packed":
        return packed.parent / name
    return packed / name if "." in name else packed.with_name(f"{packed.name}-{name}")


def diagnostics_path(packed: Path) -> Path:
    """diagnostics.json of a packed folder."""
    return beside(packed, DIAGNOSTICS)


def _remove_older(path: Path) -> None:
    """Remove the diagnostics of an older run into the same place: they say nothing about this one.

    A file of this name that is none of ours stays.
    """
    try:
        read_diagnostics(path)
    except LitBinqError:
        return
    path.unlink()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
