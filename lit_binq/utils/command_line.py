"""Command lines whose errors are one line: what was wrong and where help is."""

import sys
from collections.abc import Callable
from typing import ClassVar, NoReturn

from jsonargparse import ArgumentParser, auto_cli


class OneLine:
    """Put before a parser's class: a wrong option is one line, not a page of usage."""

    prog: str
    program: ClassVar[str] = ""  # of the command line; parsers of its parts do not know its name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and end the program with code 2."""
        line, program = " ".join(message.split()), (OneLine.program or self.prog).replace(" [options]", "")
        print(f"{program}: error: {line} ({program} --help explains every option)", file=sys.stderr)
        sys.exit(2)


class OneLineParser(OneLine, ArgumentParser):
    """jsonargparse's parser with errors of one line."""


def run(function: Callable[..., None], arguments: list[str], program: str, *, positional: bool = True) -> None:
    """Call a function whose parameters are options.

    Args:
        function: what to call; its docstring is the help text.
        arguments: the command line behind the command.
        program: the command as users write it, such as `litbinq export`.
        positional: parameters without a default are given by their place instead of by their names.
    """
    OneLine.program = program
    auto_cli(function, args=arguments, as_positional=positional, prog=program, parser_class=OneLineParser)
