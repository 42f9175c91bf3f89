"""BinQCalibration: the whole calibration as one Lightning fit.

Each decoder block is one stage, the model stage comes last (lit_binq.stages). This module says which stage is
on, hands its parameters to Lightning's automatic optimization, stops a stage early by its held-out loss, and
keeps a checkpoint at each stage boundary.

How stages and Lightning fit together:
- only what the stage in progress trains is a registered submodule, so a checkpoint, a device transfer and DDP see
  one block, never the teacher;
- DDP is wrapped anew at each stage (it fixes its set of trainable parameters when it wraps; unfreezing later would
  let ranks drift apart silently), with a placeholder parameter before the first;
- between stages nothing is being optimized, so a checkpoint taken there holds the packed blocks and no optimizer
  moments; both streams are computed again on resume by running the packed blocks, which gives the same bits.

May touch: stages, evaluation, checkpoint, models, hub. Lightning is known only in these, in data and in cli.
"""

import dataclasses
import logging
import math
import platform
import time
from typing import Any, Literal

import lightning
import torch
import transformers
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lit_binq.block_stage import BlockStage
from lit_binq.blocks import find_layers, replace_module
from lit_binq.budget import plan
from lit_binq.checkpoint import StageCheckpoint, identity, require_same
from lit_binq.diagnostics import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.evaluation import PackedEvaluation, highest_precision
from lit_binq.formats import PackedLinear
from lit_binq.hub import describe_layer, empty_layer, file_bits, require_target, save_packed, true_bits
from lit_binq.memory import peak_memory, reset_peak_memory
from lit_binq.model_stage import ModelStage
from lit_binq.models import load_model, load_tokenizer
from lit_binq.records import BlockMeasures, parse_as, write_diagnostics
from lit_binq.stages import ClosedForm, Stage, Tuning, end_stage_tuning
from lit_binq.streams import StreamOptions
from lit_binq.workspace import Workspace

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "lit_binq"
CLOSED_FORM, TUNING, FINISH, STREAMS = ClosedForm(), Tuning(epochs=24), end_stage_tuning(), StreamOptions()
DIAGNOSTICS = DiagnosticsOptions()


@dataclasses.dataclass
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
    """

    stage: int
    title: str
    before: float
    after: float
    epochs: int
    best_epoch: int
    seconds: float


class BinQCalibration(PackedEvaluation):
    """Calibrate a causal language model to packed one-bit weights, block by block, in one fit.

    Args:
        model: hub id, local folder or .gguf file of the full-precision model.
        packed: folder the packed model is written to (fit) or read from (validate, test).
        closed_form: how each linear layer is solved.
        tuning: how each block is tuned afterwards.
        finish: how the whole model is tuned at the end; `finish.epochs: 0` leaves the stage out.
        streams: where activations are cached.
        diagnostics: what is measured of each block, into diagnostics.json beside the packed folder.
        rest_dtype: dtype in which embeddings, norms and biases are stored.
        matmul_precision: float32 matrix products of block passes; statistics and solves always use the highest.
        cuda_graphs: capture tuning steps as CUDA graphs, on one GPU; several times faster for small models.
        compare_fp: validate and test the full-precision model beside the packed one.
        revision: branch, tag or commit of a hub model.
        seed: seed of the order in which windows are visited.
    """

    def __init__(
        self,
        model: str,
        packed: str = "packed",
        closed_form: ClosedForm = CLOSED_FORM,
        tuning: Tuning = TUNING,
        finish: Tuning = FINISH,
        streams: StreamOptions = STREAMS,
        diagnostics: DiagnosticsOptions = DIAGNOSTICS,
        rest_dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        cuda_graphs: bool = True,
        compare_fp: bool = True,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, packed, compare_fp, revision)
        self.closed_form, self.tuning, self.finish = closed_form, tuning, finish
        self.stream_options, self.diagnostics, self.seed = streams, diagnostics, seed
        self.rest_dtype: torch.dtype = getattr(torch, rest_dtype)
        self.matmul_precision, self.cuda_graphs = matmul_precision, cuda_graphs
        # DDP refuses to wrap a module without trainable parameters; no stage is on when Lightning first wraps it.
        self.placeholder = nn.Parameter(torch.zeros(1))
        self.active: nn.Module | None = None
        self.stage_index = 0
        self.finished = False
        self.records: list[StageRecord] = []
        self.measures: list[BlockMeasures] = []
        self._stage: Stage | None = None
        self._resume: dict[str, Any] | None = None

    # ---- set-up -----------------------------------------------------------------------------------------------

    @property
    def work(self) -> Workspace:
        """The workspace of the running fit."""
        return self._outside["work"]

    @property
    def n_stages(self) -> int:
        """Blocks, and one more if the model stage is on."""
        return len(self.work.blocks) + bool(self.finish.epochs)

    def train(self, mode: bool = True) -> "BinQCalibration":
        """Always evaluation mode: calibration matches outputs, dropout would only add noise to them."""
        return super().train(False)

    def setup(self, stage: str) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            LitBinqError: a strategy that shards the model, a precision below float32 throughout, or an output that
                cannot be written.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            refuse_sharding(type(strategy).__name__, always=True)
        if str(self.trainer.precision).endswith("-true") and self.trainer.precision != "32-true":
            raise LitBinqError(
                f"trainer.precision: got {self.trainer.precision}, expected 32-true, bf16-mixed or 16-mixed: "
                "statistics and streams are float32"
            )
        if stage == "fit":
            require_target(self.packed)
            # Stages end by their own rule, so Lightning's epoch count must not end the fit.
            self.trainer.fit_loop.max_epochs = -1
        torch.set_float32_matmul_precision(self.matmul_precision)

    def configure_model(self) -> None:
        """Load the models that this run needs."""
        if self.trainer.state.fn != "fit":
            super().configure_model()
        elif "work" not in self._outside:
            self._start_fit()

    def _start_fit(self) -> None:
        reset_peak_memory(self.trainer.strategy.root_device)
        self._began = time.monotonic()
        data = self.datamodule
        if data is None or not hasattr(data, "train_windows"):
            raise LitBinqError("fit: got no calibration data, expected the data module CalibrationData (option `data`)")
        windows = torch.cat((data.train_windows, data.held_out_windows))
        teacher = load_model(self.source, revision=self.revision)
        self._outside["work"] = Workspace(
            teacher,
            windows,
            len(data.held_out_windows),
            self.trainer.strategy.root_device,
            self.stream_options,
            self.rest_dtype,
            # Not under DDP: NCCL's own thread may touch the device while a capture is on, which ends it.
            self.cuda_graphs and self.trainer.world_size == 1,
        )
        if self.closed_form.bits:
            with highest_precision():
                self.work.bits = plan(self.work, self.closed_form.solver, self.closed_form.bits)
        self._tokens = len(data.train_windows) * windows.shape[1] * self.trainer.world_size
        self._data = {"rules": data.describe(), "fingerprint": data.fingerprint()}

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, str]:
        options: dict[str, Any] = {
            name: dataclasses.asdict(getattr(self, name)) for name in ("closed_form", "tuning", "finish")
        }
        options |= {
            "solver": type(self.closed_form.solver).__name__,
            "rest_dtype": str(self.rest_dtype),
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
        return identity(self.work.teacher, self._data["fingerprint"], options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the packed blocks and the stage; see the file's head for what is left out and why."""
        work = self.work
        done = range(min(self.stage_index, len(work.blocks)))
        checkpoint["state_dict"] = {}
        checkpoint[CHECKPOINT_KEY] = {
            "stage": self.stage_index,
            "identity": self._identity(),
            "blocks": {i: work.blocks[i].state_dict() for i in done},
            "formats": {
                i: {name: describe_layer(m) for name, m in find_layers(work.blocks[i], PackedLinear).items()}
                for i in done
            },
            "loose": {name: p.detach() for name, p in self._loose().items()},
            "records": [dataclasses.asdict(r) for r in self.records],
            "measures": [dataclasses.asdict(m) for m in self.measures],
            "seconds": time.monotonic() - self._began,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the stage; Lightning's own loop and optimizer states do not reach across a stage boundary.

        Raises:
            LitBinqError: the checkpoint is not ours, or was made with another model, data or options.
        """
        state = checkpoint.get(CHECKPOINT_KEY)
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

    def _loose(self) -> dict[str, nn.Parameter]:
        """Parameters outside the blocks that the model stage may have changed."""
        matrices = self.work.loose_matrices() if self.finish.lr_embeddings else {}
        return {**self.work.loose_norms(), **matrices}

    def _take_up(self, state: dict[str, Any]) -> None:
        """Put the checkpoint's packed blocks in place and advance both streams past them."""
        work = self.work
        self.stage_index = int(state["stage"])
        self.records = [StageRecord(**r) for r in state["records"]]
        self.measures = [parse_as(BlockMeasures, m, "block") for m in state["measures"]]
        self._began -= state["seconds"]
        for i, saved in state["blocks"].items():
            block = work.new_block(i)
            for name, entry in state["formats"][i].items():
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                replace_module(block, name, empty_layer(linear, entry))
            block.load_state_dict(saved)
            for layer in find_layers(block, PackedLinear).values():
                layer.refresh()
            work.blocks[i] = block
            work.skip(i)
        for name, p in self._loose().items():
            p.data.copy_(state["loose"][name])
        log.info("resumed behind stage %d of %d", self.stage_index, self.n_stages)
        if self.stage_index == self.n_stages:  # only the folder was still to be written
            self._write()

    # ---- stages -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """After a resume, compute the streams up to the stage to come."""
        if self._resume is not None:
            with highest_precision():
                self._take_up(self._resume)
            self._resume = None

    def on_train_epoch_start(self) -> None:
        """Begin the next stage if none is on, and pass stages that need no tuning."""
        while self._stage is None and self.stage_index < self.n_stages:
            self._enter()
        if self._stage is not None:
            generator = torch.Generator().manual_seed(
                ((self.seed * 1000 + self.stage_index) * 100_000 + self._epoch) % 2**63
            )
            order = torch.randperm(self.work.streams.train, generator=generator)
            self._order = order.to(self.trainer.strategy.root_device)

    def _enter(self) -> None:
        work, i = self.work, self.stage_index
        self._stage_began = time.monotonic()
        stage: Stage
        if i < len(work.blocks):
            stage = BlockStage(work, i, self.closed_form, self.tuning, self.diagnostics)
        else:
            stage = ModelStage(work, self.finish)
        with highest_precision():
            stage.enter()
        self._stage, self._epoch, self._stale, self._best_epoch = stage, 0, 0, 0
        self._before = self._best = self._score(stage)
        if not math.isfinite(self._best):
            raise LitBinqError(f"{stage.title}: the loss before tuning is {self._best}; expected a finite number")
        if stage.tuning.epochs == 0:
            self._finish_stage()
            return
        self.active = stage.module
        self._groups = stage.parameter_groups()
        self.placeholder.requires_grad_(False)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = self
            strategy.configure_ddp()
        strategy.setup_optimizers(self.trainer)
        self._keep_best()

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule over the stage in progress; the placeholder's optimizer before the first."""
        if self._stage is None:
            return torch.optim.AdamW([self.placeholder])
        tuning = self._stage.tuning
        fused = self.trainer.strategy.root_device.type == "cuda"
        optimizer = torch.optim.AdamW(self._groups, weight_decay=0.0, betas=(0.9, 0.95), fused=fused)
        steps = tuning.epochs * math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

        def cosine(step: int) -> float:
            done = min(step / max(steps, 1), 1.0)
            return tuning.final_lr + (1 - tuning.final_lr) * (1 + math.cos(math.pi * done)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Skip the epoch when every stage is done."""
        return -1 if self._stage is None else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The stage's loss on a batch of windows: {"index": (b,) int64} are positions in this epoch's order."""
        assert self._stage is not None
        return self._stage.loss(self._order[batch["index"]])

    def on_train_epoch_end(self) -> None:
        """Score the epoch on the held-out windows; end the stage when it is over or no longer improves."""
        stage = self._stage
        if stage is None:
            self.trainer.should_stop = self.stage_index >= self.n_stages
            return
        self._epoch += 1
        score = self._score(stage)
        self._stale += 1
        if score < self._best:
            self._best, self._stale, self._best_epoch = score, 0, self._epoch
            self._keep_best()
        self.log(f"loss/{stage.title.replace(' ', '_')}", score, sync_dist=True)
        patience = stage.tuning.patience
        if self._epoch >= stage.tuning.epochs or (patience and self._stale >= patience):
            self._finish_stage()
            self.trainer.should_stop = self.stage_index >= self.n_stages

    @torch.no_grad()
    def _score(self, stage: Stage) -> float:
        """Held-out loss over all ranks (training loss if nothing is held out); NaN counts as infinite."""
        with self.trainer.precision_plugin.train_step_context():
            sums = stage.evaluate(held_out=self.work.streams.held_out > 0)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        value = float(sums[0] / sums[1].clamp_min(1e-300))
        return math.inf if math.isnan(value) else value

    def _keep_best(self) -> None:
        self._best_state = [p.detach().clone() for group in self._groups for p in group["params"]]

    @torch.no_grad()
    def _finish_stage(self) -> None:
        stage = self._stage
        assert stage is not None
        if self.active is not None:
            parameters = [p for group in self._groups for p in group["params"]]
            for p, best in zip(parameters, self._best_state, strict=True):
                p.copy_(best)
            self._best_state, self._groups = [], []
        with highest_precision():
            stage.leave()
        if isinstance(stage, BlockStage) and stage.measures is not None:
            self.measures.append(stage.measures)
            self.log_dict(stage.measures.scalars(), rank_zero_only=True)
        self.active, self._stage = None, None
        self.placeholder.requires_grad_(True)
        seconds = time.monotonic() - self._stage_began
        record = StageRecord(
            self.stage_index, stage.title, self._before, self._best, self._epoch, self._best_epoch, seconds
        )
        self.records.append(record)
        self.stage_index += 1
        self._report(record)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # a list, set by the Trainer
            if isinstance(callback, StageCheckpoint):
                callback.save(self.trainer)
        if self.stage_index == self.n_stages:
            self._write()

    def _report(self, record: StageRecord) -> None:
        """One line a stage: stage i/n, loss before and after, true bits, time left."""
        if not self.trainer.is_global_zero:
            return
        blocks = [r.seconds for r in self.records if r.stage < len(self.work.blocks)]
        left = sum(blocks) / max(len(blocks), 1) * max(len(self.work.blocks) - self.stage_index, 0)
        later = " + model stage" if self.finish.epochs and self.stage_index < self.n_stages else ""
        log.info(
            "stage %d/%d %-8s loss %.4f -> %.4f (epoch %d of %d), %.3f true bits, %.1f s, %s left%s",
            record.stage + 1,
            self.n_stages,
            record.title,
            record.before,
            record.after,
            record.best_epoch,
            record.epochs,
            true_bits(self.work.student),
            record.seconds,
            f"{int(left) // 60}:{int(left) % 60:02d}",
            later,
        )

    # ---- the result -------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the packed folder, with every fact of this run."""
        seconds = time.monotonic() - self._began
        self.finished = True
        work = self.work
        facts = {
            "source": self.source,
            "data": self._data,
            "calibration_tokens": self._tokens,
            "calibration_seconds": round(seconds, 1),
            "calibration_peak_memory": peak_memory(work.device),
            "device": _device_name(work.device),
            "identity": self._identity(),
            "stages": [dataclasses.asdict(r) for r in self.records],
            "versions": {
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "transformers": transformers.__version__,
            },
        }
        work.streams.close()
        if self.trainer.is_global_zero:
            tokenizer = load_tokenizer(self.source, revision=self.revision)
            if self.measures:
                write_diagnostics(self.packed.parent / "diagnostics.json", self.measures)
            save_packed(work.student.cpu(), tokenizer, self.packed, facts=facts, rest_dtype=self.rest_dtype)
            log.info(
                "wrote %s: %.3f true bits, %.2f file bits, calibrated on %d tokens in %.0f s",
                self.packed,
                true_bits(work.student),
                file_bits(self.packed),
                self._tokens,
                seconds,
            )
        self.trainer.strategy.barrier()


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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
