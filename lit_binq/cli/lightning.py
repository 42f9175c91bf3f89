"""The commands fit, validate, test and predict: Lightning's command line over BinQCalibration and CalibrationData."""

import logging
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_binq import __version__
from lit_binq.calibration.checkpoint import StageCheckpoint
from lit_binq.calibration.figures import FitFigures
from lit_binq.calibration.module import BinQCalibration
from lit_binq.calibration.preflight.fit import ask_before_fit
from lit_binq.calibration.progress import StageProgress
from lit_binq.calibration.result import beside
from lit_binq.calibration.trainer_checks import refuse_callbacks, refuse_sharding, require_no_epochs, require_trainer
from lit_binq.cli.lightning_errors import one_line
from lit_binq.data.module import CalibrationData
from lit_binq.demo.fetch import require_model
from lit_binq.errors import LitBinqError
from lit_binq.evaluation.module import table
from lit_binq.utils import stopping
from lit_binq.utils.command_line import OneLine
from lit_binq.utils.files import write_bytes, write_json
from lit_binq.utils.places import Place, require_output_places
from lit_binq.utils.processes import together

LOGS, OPTIONS, WINDOWS = "logs", "options.yaml", "perplexity.csv"
"""What lies beside a result: figures of the fit, one folder a run; its options; the perplexity of every window."""


class Asked(Exception):
    """A preflight was all that was wanted; never leaves this file."""


log = logging.getLogger(__name__)


class FitParser(OneLine, LightningArgumentParser):
    """Lightning's parser with errors of one line."""


class LitBinqCLI(LightningCLI):
    """Lightning's command line with the project's defaults and four of its commands."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, with the arguments that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """A parser with errors of one line and `-c`."""
        options.setdefault("dump_header", [f"lit_binq {__version__}"])
        parser = FitParser(**options)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with options, see configs/")
        return parser

    def instantiate_trainer(self, **options: Any) -> Any:
        """The trainer. Raises LitBinqError for its wrong options."""
        refuse_sharding(str(self._get(self.config_init, "trainer.strategy")))
        trainer = self._get(self.config_init, "trainer")
        # Not there: that of the project. `false` is none, and whatever else is named takes its place.
        if trainer.get("logger") is None:
            logs = beside(self.model.packed, LOGS)
            options["logger"] = self.subcommand == "fit" and FitFigures(logs.parent, name=logs.name)
        callbacks = trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if trainer.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            options["callbacks"] = [*callbacks, StageProgress()]
        try:
            trainer = super().instantiate_trainer(**options)
        except Exception as error:  # whatever the parts raise that were chosen
            log.debug("trainer", exc_info=True)
            raise one_line("trainer", error) from error
        refuse_callbacks(trainer)
        return trainer

    def instantiate_classes(self) -> None:
        """All classes that options name. Raises LitBinqError for one that cannot be made, of a missing package say."""
        try:
            super().instantiate_classes()
        except Exception as error:
            log.debug("options", exc_info=True)
            raise one_line("options", error) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links between options, checkpoints, and options that are ours."""
        parser.link_arguments("model.model", "data.tokenizer")
        parser.link_arguments("model.revision", "data.revision")
        parser.link_arguments("model.drop_tensors", "data.drop_tensors")
        parser.add_lightning_class_args(StageCheckpoint, "checkpoint")
        parser.add_argument(
            "--evaluate",
            type=bool,
            default=True,
            help="measure perplexity after the fit, on data.evaluation",
        )
        parser.add_argument(
            "--preflight_only",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="ask everything that the fit, its evaluation and the export will ask, print an estimate, and stop",
        )
        parser.add_argument(
            "--results", type=str | None, default=None, help="JSON file the perplexities are written to"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Options to a configuration. Raises LitBinqError for a file that is no text."""
        parser.prog = f"{parser.prog} {(args or sys.argv[1:])[0]}"  # what `--help` behind it explains, for errors
        OneLine.program = parser.prog
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise LitBinqError(f"config: not UTF-8 ({error.reason}), expected a YAML file of options") from error

    def before_instantiate_classes(self) -> None:
        """Say what makes the demo's model, which is named before it is there."""
        require_model(self._get(self.config, "model.model"))

    def _parse_ckpt_path(self) -> None:
        """Lightning would look for hyper-parameters in the checkpoint; ours has none, so only check the file."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path and subcommand == "fit":
            require_checkpoint(Path(path))

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it with all its processes. Raises Stopped, with how to go on, if a signal ended it."""
        stopping.explain(lambda: self._how_to_go_on(subcommand))
        try:
            with together(self.trainer):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            number = signal.SIGTERM if isinstance(error, SIGTERMException) else stopping.stopped()
            if number is None:
                raise
            raise stopping.Stopped(number, self._how_to_go_on(subcommand)) from error

    def _how_to_go_on(self, subcommand: str) -> str:
        if subcommand != "fit":
            return "nothing was written"
        if self.model.finished:
            packed = str(self.model.packed)
            return f"{packed!r} is written, `litbinq validate` with the same options measures it"
        kept = self.model.checkpoint_file(self.trainer)
        if kept is None:
            return "no stage was finished, the same command begins again"
        return f"go on behind stage {self.model.stage_index} with the same options and --ckpt_path {kept}"

    def before_fit(self) -> None:
        """Ask what needs no model: epochs, places, evaluation texts; with `--preflight_only` ask all, and stop."""
        require_no_epochs(self._get(self.config, "trainer.max_epochs"), -1)
        require_output_places([*self.model.output_places(self.trainer), *self._results_place()])
        self.model.evaluates = bool(self._get(self.config, "evaluate"))
        if self.model.evaluates:
            self.datamodule.load_evaluation()
        if self._get(self.config, "preflight_only"):
            self._preflight()
            raise Asked

    def _preflight(self) -> None:
        """Ask what a fit asks before its first block, and print the estimate by its parts."""
        require_trainer(self.trainer)
        torch.set_float32_matmul_precision(self.model.matmul_precision)
        self.datamodule.trainer = self.trainer  # its ranks
        self.datamodule.setup("fit")
        teacher = self.model.load_source()
        ask_before_fit(self.model, self.trainer, self.datamodule, teacher, lambda report: print(report.table()))

    def _results_place(self) -> list[Place]:
        path = self._get(self.config, "results")
        return [Place("results", Path(path), "file")] if path and self.trainer.is_global_zero else []

    def before_validate(self) -> None:
        """Refuse a checkpoint, and a place that cannot be written to."""
        require_output_places(self._results_place())
        if self._get(self.config, "ckpt_path"):
            raise LitBinqError("ckpt_path: got one, expected none: validate and test read the folder `model.packed`")

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Evaluate, unless told not to. Raises LitBinqError if stages are left."""
        if not self.model.finished:
            raise LitBinqError(
                f"the fit ended after {self.model.stage_index} of its stages, expected all (trainer.max_steps, "
                "max_time or fast_dev_run?): go on with --ckpt_path and without that option"
            )
        self._keep_options()
        if self._get(self.config, "evaluate"):
            self.model.release()
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self.after_validate()

    def _keep_options(self) -> None:
        """Write the options that took effect, defaults among them, beside the result: `--config` takes them again."""
        if self.trainer.is_global_zero:
            text = self._parser("fit").dump(self.config["fit"], skip_none=False)
            write_bytes(beside(self.model.packed, OPTIONS), text.encode())

    def after_validate(self) -> None:
        """Write the results."""
        path = self._get(self.config, "results")
        if path and self.trainer.is_global_zero:
            write_json(Path(path), self.model.summary())

    after_test = after_validate

    def after_predict(self) -> None:
        """Write the perplexity of every window."""
        if self.trainer.is_global_zero:
            path = beside(self.model.packed, WINDOWS)
            write_bytes(path, table(self.model.window_perplexities).encode())
            log.info("wrote %s", path)


def lightning(arguments: list[str]) -> None:
    """Run a command.

    Args:
        arguments: the command's name and its options.

    Raises:
        LitBinqError: a user's error.
    """
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)

    with suppress(Asked):
        LitBinqCLI(
            BinQCalibration,
            CalibrationData,
            args=None if arguments == sys.argv[1:] else arguments,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs={"prog": "litbinq"},
            trainer_defaults={
                "max_epochs": -1,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
        )


def require_checkpoint(path: Path) -> None:
    """Refuse a `--ckpt_path` that is no checkpoint file.

    Raises:
        LitBinqError: no such file, or a file of another kind.
    """
    if not path.is_file():
        raise LitBinqError(
            f"ckpt_path: no such file {str(path)!r}, expected DIRPATH/last.ckpt of `--checkpoint.dirpath`"
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling makes of a file of another kind
        raise LitBinqError(
            f"ckpt_path: {str(path)!r} is no checkpoint, expected DIRPATH/last.ckpt of `--checkpoint.dirpath`"
        ) from error
