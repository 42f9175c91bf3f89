"""`litbinq info`: what runs an exported model here, in an installation of numpy, ONNX Runtime and tokenizers alone."""

import argparse

from lit_binq.utils.command_line import OneLine


class _Parser(OneLine, argparse.ArgumentParser):
    pass


def info(words: list[str]) -> None:
    """Print the operator library's path, its kernel sets, which one runs and why, and ONNX Runtime's version.

    Args:
        words: the command line from `info` on.

    Raises:
        RunError: LIT_BINQ_OPS names no library, or LIT_BINQ_KERNELS no kernel set that can run here.
    """
    parser = _Parser(
        prog="litbinq info",
        description="ONNX Runtime's version, the operator library, its kernel sets, which of them runs here and why.",
        allow_abbrev=False,
    )
    parser.parse_args(words[1:])
    from lit_binq_onnx.runtime.info import rows

    for name, text in rows():
        print(f"{name:14}{text}")
