"""Errors a user can cause. The command line prints them as one line, without a traceback."""


class LitBinqError(Exception):
    """Bad input or an unsupported request.

    The message says what came, what was expected and which option to change, in one line.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or its type's name: for one-line reports.

    Long ones are cut: some libraries quote what they could not read.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= 400 else first[:397] + "..."
