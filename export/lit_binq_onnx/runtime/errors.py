"""Errors a user can cause while running an exported model. Those of `lit_binq` are a class of their own."""


class RunError(Exception):
    """Bad input, or a folder that cannot be run.

    The message says what came, what was expected and which option to change, in one line.
    """
