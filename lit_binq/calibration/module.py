"""BinQCalibration: the whole calibration as one Lightning fit.

Each decoder block is one stage, the model stage comes last (lit_binq.calibration.stage). This module says which stage
is on, hands its parameters to Lightning's automatic optimization, keeps a stage's best epoch by its held-out loss, and
keeps a checkpoint at each stage boundary.

How stages and Lightning fit together:
- only what the stage in progress trains is a registered submodule, so a checkpoint, a device transfer and DDP see
  one block, never the teacher;
- DDP is wrapped anew at each stage (it fixes its set of trainable parameters when it wraps; unfreezing later would
  let ranks drift apart silently), with a placeholder parameter before the first;
- checkpoints are taken between stages only, when nothing is being optimized (lit_binq.calibration.resume).
"""

import copy
import dataclasses
import logging
import math
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from lit_binq.calibration.best_epoch import BestEpoch
from lit_binq.calibration.bit_allocation import plan
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.checkpoint import StageCheckpoint, fingerprint, identity, require_same
from lit_binq.calibration.model_stage import ModelStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.preflight.checks import PreflightOptions, Report
from lit_binq.calibration.preflight.fit import ask_before_fit
from lit_binq.calibration.result import FitFacts, StageRecord, diagnostics_path, log_progress, write_result
from lit_binq.calibration.resume import restore_student, student_state
from lit_binq.calibration.schedule import cosine
from lit_binq.calibration.stage import Stage
from lit_binq.calibration.stage_events import announce
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.trainer_checks import LIGHTNINGS_EPOCHS, require_no_epochs, require_trainer
from lit_binq.calibration.workspace import Workspace
from lit_binq.diagnostics.measure import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.evaluation.module import PackedEvaluation, highest_precision
from lit_binq.formats.manifest import MANIFEST
from lit_binq.models.kv_cache import KV_BITS
from lit_binq.solvers import Solver
from lit_binq.utils import stopping
from lit_binq.utils.files import UnwritableError
from lit_binq.utils.json_records import BlockMeasures, parse_as
from lit_binq.utils.memory import reset_peak_memory
from lit_binq.utils.places import Place, require_output_places

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "lit_binq"
CLOSED_FORM, TUNING, END_TO_END, STREAMS = ClosedForm(), BlockTuning(epochs=24), ModelTuning(), StreamOptions()
DIAGNOSTICS, PREFLIGHT = DiagnosticsOptions(), PreflightOptions()


def require_deployable(solver: Solver, **epochs: int) -> None:
    """Refuse to tune a published baseline, whose weights are dense; `epochs` by the option that holds them.

    Raises:
        LitBinqError: a number of epochs that is not 0.
    """
    for option, number in epochs.items():
        if number and not solver.deployable:
            raise LitBinqError(
                f"{option}.epochs: got {number} with {type(solver).__name__}, a published baseline whose dense weights "
                f"cannot be tuned; expected `{option}.epochs: 0`, or another `closed_form.solver`"
            )


def _plain(value: Any) -> Any:
    """Options as numbers, words and dictionaries; a solver's with its name."""
    if not dataclasses.is_dataclass(value):
        return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
    options = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"name": type(value).__name__, **options} if isinstance(value, Solver) else options


class BinQCalibration(PackedEvaluation):
    """Calibrate a causal language model to packed one-bit weights, block by block, in one fit.

    Args:
        model: hub id, local folder or .gguf file of the full-precision model.
        packed: folder the packed model is written to (fit) or read from (validate, test).
        closed_form: how each linear layer is solved.
        tuning: how each block is tuned afterwards.
        end_to_end: how the whole model is tuned at the end; `end_to_end.epochs: 0` leaves the stage out.
        streams: where activations are cached.
        diagnostics: what is measured of each block, into diagnostics.json beside a packed folder named `packed`, inside
            one of another name.
        unquantized_dtype: dtype in which embeddings, norms and biases are stored.
        matmul_precision: float32 matrix products of block passes; statistics and solves always use the highest.
        cuda_graphs: capture tuning steps as CUDA graphs, on one GPU; several times faster for small models.
        compare_fp: validate and test the full-precision model beside the packed one.
        revision: branch, tag or commit of a hub model.
        seed: seed of the order in which windows are visited.
        kv_bits: of the quantized model's keys and values, 4, or 0 to leave them as they are (lit_binq.models.kv_cache).
        drop_tensors: names, or regular expressions matched anywhere in them, of tensors of the source that may be left
            out although its architecture does not take them; such a checkpoint is refused otherwise.
        preflight: what is asked before the first block.

    Attributes:
        evaluates: whether an evaluation follows the fit, whose needs the preflight then asks for.
        report: what the preflight found.
    """

    def __init__(
        self,
        model: str,
        packed: str = "packed",
        closed_form: ClosedForm = CLOSED_FORM,
        tuning: BlockTuning = TUNING,
        end_to_end: ModelTuning = END_TO_END,
        streams: StreamOptions = STREAMS,
        diagnostics: DiagnosticsOptions = DIAGNOSTICS,
        unquantized_dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        cuda_graphs: bool = True,
        compare_fp: bool = True,
        revision: str | None = None,
        seed: int = 0,
        kv_bits: Literal[0, 4] = 0,
        drop_tensors: Sequence[str] = (),
        preflight: PreflightOptions = PREFLIGHT,
    ) -> None:
        super().__init__(model, packed, compare_fp, revision, drop_tensors)
        require_deployable(closed_form.solver, tuning=tuning.epochs, end_to_end=end_to_end.epochs)
        self.save_hyperparameters(
            {
                "model": model,
                "closed_form": _plain(closed_form),
                "tuning": _plain(tuning),
                "end_to_end": _plain(end_to_end),
                "unquantized_dtype": unquantized_dtype,
                "matmul_precision": matmul_precision,
                "revision": revision,
                "seed": seed,
                "kv_bits": kv_bits,
            }
        )
        self.closed_form, self.tuning, self.end_to_end = closed_form, tuning, end_to_end
        self.stream_options, self.diagnostics, self.seed = streams, diagnostics, seed
        self.unquantized_dtype: torch.dtype = getattr(torch, unquantized_dtype)
        self.matmul_precision, self.cuda_graphs = matmul_precision, cuda_graphs
        if kv_bits not in KV_BITS:
            raise LitBinqError(f"kv_bits: got {kv_bits}, expected one of {', '.join(map(str, KV_BITS))}")
        self.kv_bits, self.preflight, self.evaluates = kv_bits, preflight, False
        self.report: Report | None = None
        # DDP refuses to wrap a module without trainable parameters; no stage is on when Lightning first wraps it.
        self.placeholder = nn.Parameter(torch.zeros(1))
        self.active: nn.Module | None = None
        self.stage_index = 0
        self.finished = False
        self.records: list[StageRecord] = []
        self.measures: list[BlockMeasures] = []
        self._stage: Stage | None = None
        self._resume: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None

    # ---- set-up -----------------------------------------------------------------------------------------------

    @property
    def work(self) -> Workspace:
        """The workspace of the running fit."""
        return self._outside["work"]

    @property
    def n_stages(self) -> int:
        """Blocks, and one more if the model stage is on."""
        return len(self.work.blocks) + bool(self.end_to_end.epochs)

    def train(self, mode: bool = True) -> "BinQCalibration":
        """Always evaluation mode: calibration matches outputs, dropout would only add noise to them."""
        return super().train(False)

    def output_places(self, trainer: pl.Trainer) -> list[Place]:
        """What this rank of a fit with `trainer` will write, for `lit_binq.utils.places.require_output_places`."""
        places = []
        if trainer.is_global_zero:
            places.append(Place("model.packed", self.packed, "folder", MANIFEST))
            if self.diagnostics.windows:
                places.append(Place("model.diagnostics", diagnostics_path(self.packed), "file"))
            places += [
                Place("checkpoint.dirpath", callback.path.parent, "parent")
                for callback in trainer.callbacks  # type: ignore[attr-defined]  # a list, set by the Trainer
                if isinstance(callback, StageCheckpoint)
            ]
        if self.stream_options.cache == "disk":
            folder = self.stream_options.cache_dir or tempfile.gettempdir()
            places.append(Place("model.streams.cache_dir", Path(folder), "parent"))
        return places

    def checkpoint_file(self, trainer: pl.Trainer) -> Path | None:
        """The checkpoint that goes on behind the last finished stage; None if there is none yet."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a list, set by the Trainer
        written = [c.path for c in callbacks if isinstance(c, StageCheckpoint) and c.saved]
        given = trainer.ckpt_path
        return written[0] if written else Path(given) if given else None

    def setup(self, stage: str) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            LitBinqError: a strategy that shards the model, a precision below float32 throughout, a number of epochs,
                or an output that cannot be written.
        """
        require_trainer(self.trainer)
        if stage == "fit":
            require_output_places(self.output_places(self.trainer))
            require_no_epochs(self.trainer.max_epochs, -1, LIGHTNINGS_EPOCHS)
            # Stages end by their own rule, so Lightning's epoch count must not end the fit.
            self.trainer.fit_loop.max_epochs = -1
        torch.set_float32_matmul_precision(self.matmul_precision)

    def configure_model(self) -> None:
        """Load the models that this run needs."""
        if self.trainer.state.fn != "fit":
            super().configure_model()
        elif "work" not in self._outside:
            # Lightning makes the device the default place of new tensors here. The teacher rests on the host, whatever
            # its size, and streams where their option says; what belongs on the device is put there by name.
            with torch.device("cpu"):
                self._start_fit()

    def _start_fit(self) -> None:
        reset_peak_memory(self.trainer.strategy.root_device)
        self._began = time.monotonic()
        data = self.datamodule
        if data is None or not hasattr(data, "train_windows"):
            raise LitBinqError("fit: got no calibration data, expected the data module CalibrationData (option `data`)")
        windows = torch.cat((data.train_windows, data.held_out_windows))
        teacher = self.load_source()
        self.report = ask_before_fit(self, self.trainer, data, teacher, self._show)
        self._model = fingerprint(teacher)
        self._outside["work"] = Workspace(
            teacher,
            windows,
            len(data.held_out_windows),
            self.trainer.strategy.root_device,
            self.stream_options,
            self.unquantized_dtype,
            # Not under DDP: NCCL's own thread may touch the device while a capture is on, which ends it.
            self.cuda_graphs and self.trainer.world_size == 1,
            self.kv_bits,
            self.report.calls,
        )
        if self.closed_form.bits:
            with highest_precision():
                bits = plan(self.work, self.closed_form.solver, self.closed_form.bits)
            # Shapes follow from it: should ranks round differently, the first one is right.
            self.work.bits = self.trainer.strategy.broadcast(bits)
        self._tokens = len(data.train_windows) * windows.shape[1] * self.trainer.world_size
        self._data = {"rules": data.describe(), "fingerprint": data.fingerprint()}

    def _show(self, report: Report) -> None:
        if self.trainer.is_global_zero:
            log.info("%s", report.line())
            if not self.closed_form.solver.deployable:
                log.warning(
                    "%s is a published baseline: its weights are kept as dense float32 and its bits are counted, not "
                    "stored; the result can be evaluated, but not exported",
                    type(self.closed_form.solver).__name__,
                )

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, str]:
        options: dict[str, Any] = {
            name: dataclasses.asdict(getattr(self, name)) for name in ("closed_form", "tuning", "end_to_end")
        }
        options |= {
            "solver": type(self.closed_form.solver).__name__,
            "unquantized_dtype": str(self.unquantized_dtype),
            "kv_bits": self.kv_bits,
            "seed": self.seed,
            "ranks": self.trainer.world_size,
            "batch_size": getattr(self.datamodule, "batch_size", None),
            "batch_windows": self.stream_options.batch_windows,
            "matmul_precision": self.matmul_precision,
            "precision": str(self.trainer.precision),
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "gradient_clip_val": self.trainer.gradient_clip_val,
            "limit_train_batches": self.trainer.limit_train_batches,
        }
        return identity(self._model, self._data["fingerprint"], options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the packed blocks and the stage; see lit_binq.calibration.resume for what is left out and why."""
        checkpoint["state_dict"] = {}
        checkpoint[CHECKPOINT_KEY] = self._before or self._state()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the finished stages, also while another is on."""
        done = min(self.stage_index, len(self.work.blocks))
        return {
            "stage": self.stage_index,
            "identity": self._identity(),
            **student_state(self.work, done, matrices=self.end_to_end.lr_embeddings > 0),
            "records": [dataclasses.asdict(r) for r in self.records[: self.stage_index]],
            "measures": [dataclasses.asdict(m) for m in self.measures[:done]],
            "seconds": time.monotonic() - self._began,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the stage; Lightning's own loop and optimizer states do not reach across a stage boundary.

        Raises:
            LitBinqError: the checkpoint is not ours, or was made with another model, data or options.
        """
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is not None and self.trainer.state.fn != "fit":
            # Under SLURM Lightning finds it by itself, for the evaluation too, which reads the packed folder.
            checkpoint["state_dict"] = self.state_dict()
            return
        if state is None or "work" not in self._outside:
            raise LitBinqError(
                "ckpt_path: got a file without calibration state, or a command other than fit; "
                "expected a checkpoint of this command and `litbinq fit`"
            )
        require_same(state["identity"], self._identity())
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        checkpoint.pop("loops", None)
        self._resume = state

    def _resume_from(self, state: dict[str, Any]) -> None:
        """Go on behind the checkpoint's last stage."""
        self.stage_index = int(state["stage"])
        self.records = [StageRecord(**r) for r in state["records"]]
        self.measures = [parse_as(BlockMeasures, m, "block") for m in state["measures"]]
        self._began -= state["seconds"]
        restore_student(self.work, state, matrices=self.end_to_end.lr_embeddings > 0)
        log.info("resumed behind stage %d of %d", self.stage_index, self.n_stages)
        if self.stage_index == self.n_stages:  # only the folder was still to be written
            self._write()

    # ---- stages -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """After a resume, compute the streams up to the stage to come."""
        if self._resume is not None:
            with highest_precision():
                self._resume_from(self._resume)
            self._resume = None

    def on_train_start(self) -> None:
        """Take SIGTERM back from Lightning, as evaluation does."""
        self.answer_signals()

    def ask_stop(self) -> None:
        """End here if the process was told to stop. Raises Stopped or Lightning's SIGTERMException."""
        stopping.ask()
        if self.trainer.received_sigterm:
            raise SIGTERMException(128 + signal.SIGTERM)

    def on_train_epoch_start(self) -> None:
        """Begin the next stage if none is on: one an epoch, so that Lightning has its say between any two."""
        if self._stage is None and self.stage_index < self.n_stages:
            self._enter()
        if self._tunes:
            generator = torch.Generator().manual_seed(
                ((self.seed * 1000 + self.stage_index) * 100_000 + self._kept.epoch) % 2**63
            )
            order = torch.randperm(self.work.streams.train, generator=generator)
            self._order = order.to(self.trainer.strategy.root_device)
            # The highest of all groups', which a schedule moves alike.
            highest = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
            self.log("lr", highest, rank_zero_only=True, sync_dist=True)

    def _enter(self) -> None:
        work, i = self.work, self.stage_index
        self._stage_began = time.monotonic()
        stage: Stage
        if i < len(work.blocks):
            stage = BlockStage(work, i, self.closed_form, self.tuning, self.diagnostics)
        else:
            stage = ModelStage(work, self.end_to_end)
            self._before = copy.deepcopy(self._state())  # the stage changes the student in place
        stage.ask = self.ask_stop
        announce(self.trainer, "on_stage_start", stage)
        with highest_precision():
            stage.enter()
        before = self._score(stage)
        if not math.isfinite(before):
            raise LitBinqError(f"{stage.title}: the loss before tuning is {before}; expected a finite number")
        self._stage, epochs = stage, stage.tuning.epochs
        self._groups = stage.parameter_groups() if epochs else []
        if epochs:
            self.active = stage.module
            self.placeholder.requires_grad_(False)
            strategy = self.trainer.strategy
            if isinstance(strategy, DDPStrategy):
                strategy.model = self
                strategy.configure_ddp()
            strategy.setup_optimizers(self.trainer)
        # After DDP has made the parameters the same on all ranks.
        parameters = [p for group in self._groups for p in group["params"]]
        self._kept = BestEpoch(parameters, before, epochs)

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule over the stage in progress; the placeholder's optimizer before the first."""
        if self._stage is None:
            return torch.optim.AdamW([self.placeholder])
        fused = self.trainer.strategy.root_device.type == "cuda"
        optimizer = torch.optim.AdamW(self._groups, weight_decay=0.0, betas=(0.9, 0.95), fused=fused)
        steps = self._stage.tuning.epochs * math.ceil(
            self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Skip the epoch of a stage without tuning, and when every stage is done."""
        return None if self._tunes else -1

    @property
    def _tunes(self) -> bool:
        return self._stage is not None and self._stage.tuning.epochs > 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The stage's loss on a batch of windows: {"index": (b,) int64} are positions in this epoch's order."""
        assert self._stage is not None
        return self._stage.loss(self._order[batch["index"]])

    def on_train_epoch_end(self) -> None:
        """Score the epoch on the held-out windows; end the stage behind its last one."""
        stage = self._stage
        if stage is not None and self._tunes:
            score = self._score(stage)
            self.log(f"loss/{stage.title.replace(' ', '_')}", score, sync_dist=True)
            if not self._kept.add(score):
                return
        if stage is not None:
            self._finish_stage()
        self.trainer.should_stop = self.stage_index >= self.n_stages

    @torch.no_grad()
    def _score(self, stage: Stage) -> float:
        """Held-out loss over all ranks (training loss if nothing is held out); NaN counts as infinite."""
        # Not through Lightning's validation loop: a score is also needed before the first epoch and where no epoch is
        # (a closed form alone), a stage without held-out windows scores its training windows, and `validate` measures
        # other data with other models.
        with self.trainer.precision_plugin.train_step_context():
            sums = stage.evaluate(held_out=self.work.streams.held_out > 0)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        value = float(sums[0] / sums[1].clamp_min(1e-300))
        return math.inf if math.isnan(value) else value

    @torch.no_grad()
    def _finish_stage(self) -> None:
        stage = self._stage
        assert stage is not None
        kept = self._kept
        kept.restore()
        del self._kept
        with highest_precision():
            stage.leave()
        if isinstance(stage, BlockStage) and stage.measures is not None:
            self.measures.append(stage.measures)
            # With both, Lightning neither waits for other ranks nor warns that they were not asked.
            self.log_dict(stage.measures.scalars(), rank_zero_only=True, sync_dist=True)
        self.active, self._stage, self._groups, self._before = None, None, [], None
        self.placeholder.requires_grad_(True)
        seconds = time.monotonic() - self._stage_began
        record = StageRecord(
            self.stage_index,
            stage.title,
            kept.before,
            kept.score,
            kept.epoch,
            kept.kept,
            seconds,
            stage.activation_bits,
        )
        self.records.append(record)
        self.stage_index += 1
        if self.trainer.is_global_zero:
            log_progress(self.records, self.work, self.n_stages)
        announce(self.trainer, "on_stage_end", record)
        if self.stage_index == self.n_stages:
            self._write()

    def _write(self) -> None:
        """Write the packed folder, with every fact of this run."""
        self.work.streams.close()
        if self.trainer.is_global_zero:
            assert self.report is not None
            run = FitFacts(self.source, self.revision, self._data, self._tokens, self._identity(), self.report.facts())
            seconds = time.monotonic() - self._began
            try:
                write_result(self.packed, self.work, run, self.records, self.measures, seconds)
            except UnwritableError as error:
                kept = self.checkpoint_file(self.trainer)
                rescue = f"the same options with another `model.packed` and --ckpt_path {kept} only write"
                raise LitBinqError(f"{error}; {rescue}" if kept else str(error)) from error
        self.trainer.strategy.barrier()
        self.finished = True
