"""The command `litbinq`: the table of commands, help, one-line errors, exit codes.

Every command is a function whose parameters are its options (jsonargparse), but for Lightning's own (fit, validate,
test and predict take its command line) and for generate, which runs where nothing but numpy, ONNX Runtime and
tokenizers is installed. Nothing heavy is imported before a command is known.
"""

import atexit
import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from lit_binq.errors import LitBinqError
from lit_binq.utils import stopping
from lit_binq.utils.command_line import OneLine, run
from lit_binq_onnx.runtime.errors import RunError

log = logging.getLogger("lit_binq")

OF_EXTRAS = {
    "torch", "lightning", "pytorch_lightning", "jsonargparse", "torchmetrics", "transformers", "datasets", "accelerate",
    "gguf", "safetensors", "onnx", "onnx_ir", "onnxscript", "matplotlib", "yaml", "jinja2",
}  # fmt: skip
"""Packages that the extras in pyproject.toml bring."""


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
        function: `module:name`, imported when it is called.
        arguments: what it needs, for the overview.
        summary: what it does, for the overview.
        positional: parameters without a default are given by their place instead of by their names.
        more: a module whose docstring follows the explanation of the options.
        extra: what must be installed for it beside the base package, as pyproject.toml calls it.
        raw: the function takes the words of the command line as they are.
    """

    function: str
    arguments: str
    summary: str
    positional: bool = True
    more: str = ""
    extra: str = "calibrate"
    raw: bool = False

    def load(self) -> Callable[..., None]:
        """The function itself."""
        module, name = self.function.split(":")
        function: Callable[..., None] = getattr(import_module(module), name)
        return function


_FIT, _HERE, _BENCH, _DEMO = (
    "lit_binq.cli.lightning:lightning", "lit_binq.cli.commands", "lit_binq_onnx.bench.main", "lit_binq.demo"
)  # fmt: skip
COMMANDS = {
    "fit": Command(_FIT, "--config FILE", "calibrate a model; files are in configs/", raw=True),
    "validate": Command(
        _FIT, "--config FILE", "perplexity of a packed model beside its full-precision source", raw=True
    ),
    "test": Command(_FIT, "--config FILE", "the same on the test loaders", raw=True),
    "predict": Command(_FIT, "--config FILE", "perplexity of every window, into perplexity.csv", raw=True),
    "compare": Command(
        f"{_HERE}:compare", "--config FILE", "a table of methods, one fit a row", False, "lit_binq.compare.plan"
    ),
    "report": Command(f"{_HERE}:report", "RUN", "pictures and a page of a run, or of several", extra="report"),
    "export": Command(f"{_HERE}:export", "PACKED OUT", "packed folder to ONNX", extra="export"),
    "check": Command(f"{_HERE}:check", "OUT", "compare an exported model with torch", extra="export"),
    "generate": Command(
        "lit_binq.cli.generate:generate", 'OUT --prompt "Once"', "write text with an exported model", raw=True
    ),
    "info": Command(
        "lit_binq.cli.info:info", "", "the operator library, its kernels, ONNX Runtime's version", raw=True
    ),
    "bench ops": Command(f"{_BENCH}:ops", "", "how fast is one product, by our kernels and by ONNX Runtime's"),
    "bench decode": Command(f"{_BENCH}:decode", "OUT", "tokens a second of an exported model, beside other programs"),
    "bench prefill": Command(f"{_BENCH}:prefill", "OUT", "the same of reading a prompt"),
    "bench shape": Command(f"{_BENCH}:shape", "MODEL", "decoding at a model's shapes, beside ONNX Runtime's 4 bits"),
    "bench perplexity": Command(f"{_BENCH}:perplexity", "OUT TEXT", "how well exported models predict a text"),
    "demo fetch": Command(f"{_DEMO}.fetch:fetch", "--out DIR", "the demo's model and texts", False),
    "demo convert": Command(f"{_DEMO}.fetch:convert", "--model GGUF --out DIR", "GGUF to a checkpoint folder", False),
    "demo summarize": Command(f"{_DEMO}.summary:summarize", "--help", "figures of a fit and of its export", False),
    "demo corpora": Command(f"{_DEMO}.corpora:corpora", "--out DIR", "more texts to evaluate on", False),
}
"""By the words behind `litbinq`. The overview and every error about a word are made from this."""


def overview(group: str = "") -> str:
    """The help text: all commands, or those of a group such as `bench`."""
    rows = [(f"{name} {c.arguments}", c.summary) for name, c in COMMANDS.items() if name.startswith(group)]
    wide = max(len(call) for call, _ in rows)
    return "\n".join(
        [
            f"usage: litbinq {f'{group.strip()} ' if group else ''}COMMAND [OPTIONS]",
            "",
            "1-bit language models: calibrate block by block, export to ONNX with packed bits, run on ONNX Runtime.",
            "",
            "commands:",
            *(f"  {call:{wide}}  {summary}" for call, summary in rows),
            "",
            "litbinq COMMAND --help explains every option. Exit codes: 0 done, 1 an error that the last line names,",
            "2 wrong usage, 130 ended by Ctrl-C, 143 by SIGTERM (the last line says how to go on).",
            "",
        ]
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments without the program's name; `sys.argv` if None.

    Returns:
        The exit code: 0 done, 1 a user's error (one line on standard error), 128 + n ended by signal n.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    OneLine.program = ""  # of an earlier call
    with stopping.listening(last=args is None):
        try:
            code = _main(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has enough, as `head` has
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed
            return 128 + signal.SIGPIPE
    return code


def command() -> NoReturn:
    """The console script: `main`, and the process's end.

    A run that a signal ended leaves threads of libraries behind, which C++ answers with `terminate` when the
    interpreter is taken down around them. So such a process tidies up and leaves without that.
    """
    code = main()
    if code > 128:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    _set_up_output()
    name = _command(arguments)
    if isinstance(name, int):
        return name
    command, rest = COMMANDS[name], arguments[len(name.split()) :]
    try:
        function = command.load()
        if command.raw:
            function(arguments)
        else:
            epilog = import_module(command.more).__doc__ if command.more else None
            run(function, rest, f"litbinq {name}", positional=command.positional, epilog=epilog)
    except (LitBinqError, RunError) as error:
        print(f"litbinq {name}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OF_EXTRAS:
            raise
        extra = "bench" if name.startswith("bench") else command.extra
        print(f"litbinq {name}: error: needs {package}: pip install 'lit-binq[{extra}]'", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except stopping.Stopped as stopped:
        return _say(name, stopped)
    except Exception as error:
        if (number := stopping.stopped()) is not None:  # what the end of other processes or threads leads to
            return _say(name, stopping.Stopped(number))
        if not _is_users(error):
            from lit_binq.cli.lightning_errors import of_chosen_part

            line = of_chosen_part(error)
            if line is None:
                raise
            error = line
        print(f"litbinq {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _command(words: list[str]) -> str | int:
    """The command that a command line begins with; or the exit code, where it asks for help or has no such command."""
    group = f"{words[0]} " if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    word = words[bool(group)] if len(words) > bool(group) else ""
    if group + word in COMMANDS:
        return group + word
    if word in ("-h", "--help", "") and not (group and not word):
        print(overview(group), end="")
        return 0 if word else 2
    # The first word of each, once.
    known = dict.fromkeys(name.removeprefix(group).split()[0] for name in COMMANDS if name.startswith(group))
    print(f"litbinq {group.strip()}: ".replace(" :", ":") + f"unknown command {word!r}, expected one of "
          f"{', '.join(known)}", file=sys.stderr)  # fmt: skip
    return 2


def _say(name: str, stopped: stopping.Stopped) -> int:
    """The one line about a signal, from one of the processes of a run; returns the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"litbinq {name}: {stopped}", file=sys.stderr)
    return 128 + stopped.number


def _is_users(error: Exception) -> bool:
    """Whether Lightning or torch report a wrong option or too little memory rather than a defect."""
    if _is_a(error, "torch", "OutOfMemoryError"):
        error.args = (
            f"out of device memory ({str(error).splitlines()[0]}): lower `data.batch_size` or "
            "`model.streams.batch_windows`, or set `model.streams.cache: host`",
        )
        return True
    if isinstance(error, OSError) and error.filename and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        error.args = (f"{error.filename!r} cannot be written or read ({error.strerror})",)
        return True
    return _is_a(error, "lightning.fabric.utilities.exceptions", "MisconfigurationException")


def _is_a(error: Exception, module: str, name: str) -> bool:
    """Whether an error is of a module's class; a module that was never imported raised nothing."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _set_up_output() -> None:
    """One plain stream of progress lines on standard error; the libraries speak up from warnings on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Lightning calls a method that jsonargparse has renamed; nothing a user could act on.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding, a file name that is no text
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    logging.getLogger("lit_binq_onnx").setLevel(logging.INFO)
    # Called from within Python (tests, notebooks), `args` is meant.
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    # Lightning uses a name that torch has renamed; nothing a user could act on.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Loaders read a tensor in memory, workers would only copy it; while fitting there is no validation loader.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
    # Calibration runs its modules in evaluation mode on purpose.
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")
    # Of transformers and of hub downloads; read when they are imported, which may have happened.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if hf_logging := sys.modules.get("transformers.utils.logging"):
        hf_logging.disable_progress_bar()
