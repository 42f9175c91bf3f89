"""The command `litbinq`.

    fit, validate, test      Lightning's command line over BinQCalibration and CalibrationData (cli_lightning)
    compare                  a table of fits, each a process of its own
    report                   pictures and one page of a run's diagnostics
    export, check, generate  plain functions over an exported folder (package lit_binq_onnx)
    bench                    measurements; its functions are in lit_binq_onnx.bench.main

Its own job: help texts, one-line errors, exit codes.
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
from pathlib import Path
from typing import Literal, NoReturn

from lit_binq.errors import LitBinqError
from lit_binq.utils import stopping
from lit_binq.utils.command_line import OneLine

log = logging.getLogger("lit_binq")

OVERVIEW = """usage: litbinq COMMAND [OPTIONS]

1-bit language models: calibrate block by block, export to ONNX with packed bits, run on ONNX Runtime.

commands:
  fit       calibrate a model:       litbinq fit --config configs/smollm2-135m-demo.yaml
  validate  perplexity of a packed model beside its full-precision source (same options as fit)
  test      the same on the test loaders
  compare   a table of methods, one fit a row:   litbinq compare --config configs/compare-ladder-s.yaml
  report    pictures and a page of runs:         litbinq report RUN [--beside OTHER]
  export    packed folder to ONNX:   litbinq export PACKED OUT
  check     compare an exported model with torch:          litbinq check OUT
  generate  write text with it:      litbinq generate OUT --prompt "Once upon a time"
  bench     how fast, beside others: litbinq bench ops, litbinq bench decode OUT, litbinq bench prefill OUT

litbinq COMMAND --help explains every option. Exit codes: 0 done, 1 an error that the last line names, 2 wrong usage,
130 ended by Ctrl-C, 143 by SIGTERM (the last line says how to go on).
"""


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
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    commands: dict[str, Callable[..., None]] = {
        "report": report,
        "export": export,
        "check": check,
        "generate": generate,
    }
    others = ("fit", "validate", "test", "compare", "bench")
    if command not in commands and command not in others:
        print(f"litbinq: unknown command {command!r}, expected one of {', '.join((*others, *commands))}",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        if command in commands:
            from lit_binq.utils.command_line import run

            run(commands[command], rest, f"litbinq {command}")
        elif command == "compare":
            _compare(rest)
        elif command == "bench":
            from lit_binq_onnx.bench.main import main as bench

            return bench(rest)
        else:
            from lit_binq.cli.lightning import lightning

            lightning(arguments)
    except LitBinqError as error:
        print(f"litbinq {command}: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except stopping.Stopped as stopped:
        return _say(command, stopped)
    except Exception as error:
        if (number := stopping.stopped()) is not None:  # what the end of other processes or threads leads to
            return _say(command, stopping.Stopped(number))
        if not _is_users(error):
            from lit_binq.cli.lightning_errors import of_chosen_part

            line = of_chosen_part(error)
            if line is None:
                raise
            error = line
        print(f"litbinq {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _say(command: str, stopped: stopping.Stopped) -> int:
    """The one line about a signal, from one of the processes of a run; returns the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"litbinq {command}: {stopped}", file=sys.stderr)
    return 128 + stopped.number


def _is_users(error: Exception) -> bool:
    """Whether Lightning or torch report a wrong option or too little memory rather than a defect."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, torch.OutOfMemoryError):
        error.args = (
            f"out of device memory ({str(error).splitlines()[0]}): lower `data.batch_size` or "
            "`model.streams.batch_windows`, or set `model.streams.cache: host`",
        )
        return True
    if isinstance(error, OSError) and error.filename and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        error.args = (f"{error.filename!r} cannot be written or read ({error.strerror})",)
        return True
    return isinstance(error, MisconfigurationException)


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
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()


def _compare(arguments: list[str]) -> None:
    """compare: run the rows of a YAML file and print the table."""
    import argparse

    from lit_binq.compare import plan as compare_plan
    from lit_binq.compare.runner import compare

    class Parser(OneLine, argparse.ArgumentParser):
        pass

    parser = Parser(
        prog="litbinq compare",
        description="A table of methods: true bits, perplexity on several corpora with its ratio to full precision, "
        "calibration seconds and peak memory. Every row is one `litbinq fit`; rows that are done are not run again.",
        epilog=compare_plan.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="what to compare, see below")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="NAME", help="rows to run; the table shows all there are"
    )
    options = parser.parse_args(arguments)
    table, failed = compare(options.config, options.only)
    print(table, end="")
    if failed:
        raise LitBinqError(
            f"no result for {', '.join(map(repr, failed))}: the reasons stand under the table; the same command tries "
            "again what is not done"
        )


def report(run: str, out: str | None = None, beside: list[str] | str | None = None) -> None:
    """Draw the diagnostics of a run: PNG pictures and one page that needs nothing else.

    The fit must have measured something: option `model.diagnostics.windows`.

    Args:
        run: folder of a run, or its packed folder.
        out: folder to write; RUN/report if not given.
        beside: other runs to draw on the same axes: FOLDER, or several with commas between.
    """
    from lit_binq.report.page import report as draw

    draw(run, out, beside)


def export(
    packed: str,
    out: str,
    check: bool = True,
    head_bits: Literal[0, 4, 8] = 0,
    head_block: Literal[16, 32, 64, 128] | None = None,
    head_text: str | None = None,
    fused: Literal["auto", "off"] = "auto",
    target: Literal["ort", "genai"] = "ort",
) -> None:
    """Export a packed folder to ONNX with packed-bit operators.

    The folder OUT gets model.onnx with its data file, the tokenizer, and a record of what was exported. It runs on
    ONNX Runtime with our operator library, and without it on the function bodies inside the file.

    Args:
        packed: folder written by `litbinq fit`.
        out: folder to write.
        check: compare prefill, decode and left-padded batches with torch; a failed check leaves nothing behind.
        head_bits: round the head, which much of a small model's time goes into, to 4 or 8 bits, and the embedding to 8;
            0 leaves both.
        head_block: how many weights of the head share a scale: 32 if not given, or 16 where the width demands it.
        head_text: a text file; a head of 4 bits errs less on texts like it. Random tokens if not given.
        fused: `auto` adds model_fused.onnx, faster, for LLaMA-like models (LLaMA, Mistral, Qwen 2 and 3) once its
            logits equal torch's; `off` writes the traced graph only.
        target: `genai` also writes what onnxruntime-genai needs to run the folder: genai_config.json and our library.
    """
    from lit_binq.hub.save_load import load_packed
    from lit_binq.utils.places import require_folder
    from lit_binq_onnx.build import export as onnx_export

    require_folder(Path(out), "out", onnx_export.FACTS)  # before a large model is loaded
    model, tokenizer = load_packed(packed)
    onnx_export.export_onnx(
        model,
        tokenizer,
        out,
        packed=packed,
        check=check,
        head_bits=head_bits,
        head_block=head_block,
        head_text=head_text,
        fused=fused,
        target=target,
    )


def check(out: str, packed: str | None = None) -> None:
    """Compare an exported model with the packed torch model it was made from.

    Args:
        out: folder written by `litbinq export`.
        packed: the packed folder, if it is no longer where it was at export.
    """
    from lit_binq_onnx.build.check import check_onnx

    print(check_onnx(out, packed=packed))


def generate(
    out: str,
    prompt: str = "Once upon a time",
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    chat: bool = False,
    threads: int = 0,
    mode: Literal["lut", "exact"] = "lut",
) -> None:
    """Write text with an exported model on ONNX Runtime, as it is decoded; tokens/s at the end.

    What is not given of temperature, top_k, top_p and repetition_penalty is as the model's own generation_config.json
    has it; a model that says nothing takes the likeliest token each time, which small ones end in repeating themselves.

    Args:
        out: folder written by `litbinq export`.
        prompt: text to go on from.
        max_new_tokens: most tokens to write.
        temperature: 0 takes the likeliest token each time; the higher, the more freely it is chosen.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: sample among the likeliest tokens that together have this probability.
        repetition_penalty: above 1, such as 1.2, makes tokens that occurred already less likely.
        seed: seed of the sampling.
        chat: put the prompt into the tokenizer's chat template as the user's message.
        threads: threads of ONNX Runtime; 0 lets it choose.
        mode: `lut` (int8 tables, fast) or `exact` (float32 activations).
    """
    from lit_binq.models.load import load_tokenizer
    from lit_binq_onnx.runtime.generate import generate as onnx_generate
    from lit_binq_onnx.runtime.session import OnnxModel

    model = OnnxModel(out, mode=mode, threads=threads)
    text = onnx_generate(
        model,
        load_tokenizer(out),
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        chat=chat,
    )
    if not chat:
        print(prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print(flush=True)
    stats = text.stats
    log.info(
        "%d prompt tokens in %.2f s, then %.1f tokens/s (%s)",
        stats.prompt_tokens,
        stats.prefill_seconds,
        stats.tokens_per_second,
        f"native operators, {mode}" if model.native else "stock operators",
    )
