"""Command lines whose errors are one line: what was wrong and where help is."""

import argparse
import re
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar, NoReturn

# Options that are no longer where they were, by the end of their names.
_GONE = {
    "finish": "it is called `model.end_to_end` now",
    "rest_dtype": "it is called `model.unquantized_dtype` now",
    "style": "it is called `normalization` now",
    "--beside": "it is called `--baselines` now (`--baseline` of `litbinq demo summarize`)",
    "--stock": "it is called `--unmodified` now",
    "closed_form.amp": "a baseline has it now: closed_form.solver: OutputAlignment, with its option `amp`",
    "closed_form.scope": "a baseline has it now: closed_form.solver: OutputAlignment, with its option `scope`",
}


class OneLine:
    """Put before a parser's class: a wrong option is one line, not a page of usage."""

    prog: str
    program: ClassVar[str] = ""  # of the command line; parsers of its parts do not know its name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and end the program with code 2."""
        line, program = " ".join(message.split()), (OneLine.program or self.prog).replace(" [options]", "")
        line += "".join(f"; {where}" for name, where in _GONE.items() if re.search(rf"{re.escape(name)}\b", line))
        print(f"{program}: error: {line} ({program} --help explains every option)", file=sys.stderr)
        sys.exit(2)


def run(
    function: Callable[..., None],
    arguments: list[str],
    program: str,
    *,
    positional: bool = True,
    epilog: str | None = None,
) -> None:
    """Call a function whose parameters are options.

    Args:
        function: what to call; its docstring is the help text.
        arguments: the command line behind the command.
        program: the command as users write it, such as `litbinq export`.
        positional: parameters without a default are given by their place instead of by their names.
        epilog: text that follows the explanation of the options.
    """
    # Not in the base installation, whose commands (litbinq generate) are read without it.
    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

    class Parser(OneLine, ArgumentParser):
        pass

    class Epilog(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Lines of the text behind the options stay as they are."""

    OneLine.program = program
    more: dict[str, Any] = {"epilog": epilog, "formatter_class": Epilog} if epilog else {}
    summary = (function.__doc__ or "").partition("\n\n")[0]
    parser = Parser(prog=program, description=summary, **more)
    own = "config" in signature(function).parameters  # else it is the usual file of options
    if not own:
        parser.add_argument("--config", action=ActionConfigFile, help="Path to a configuration file.")
    parser.add_function_arguments(function, as_group=False, as_positional=positional)
    options = parser.parse_args(arguments).as_dict()
    if not own:
        options.pop("config")
    function(**options)
