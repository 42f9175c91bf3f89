"""What tests of the command line share."""

import pytest


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error; no traceback is above it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]
