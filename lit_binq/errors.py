"""Errors a user can cause. The command line prints them as one line, without a traceback.

Touches nothing: every other room may import this file.
"""


class LitBinqError(Exception):
    """Bad input or an unsupported request.

    The message says what came, what was expected and which option to change, in one line.
    """
