"""The processes of a run on several devices: a signal to one ends them all, and none outlives the first.

Lightning starts the others from the first one and kills the first as soon as another ends. So one that is told to stop
tells the first, and waits to be ended with it.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_binq.utils import stopping

FIRST = "LIT_BINQ_FIRST_PROCESS"
"""Environment variable: process number of the one that started this one."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def is_another() -> bool:
    """Whether this process was started by the first one of a run."""
    return os.environ.get(FIRST) == str(os.getppid())


def requeued(trainer: pl.Trainer) -> bool:
    """Whether Lightning answers the signals, because SLURM starts the run again."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Around all that a trainer does: signals reach every process, and their end is this one's."""
    launcher = trainer.strategy.launcher
    if is_another():
        if sys.platform == "linux":  # killed with the first, also where it waits for it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        first = os.getppid()
        stopping.tell(lambda _: _send(first, signal.SIGTERM))
    elif launcher is not None:
        if isinstance(launcher, _SubprocessScriptLauncher):
            os.environ[FIRST] = str(os.getpid())
        stopping.tell(lambda number: launcher.kill(signal.Signals(number)))
    if requeued(trainer) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning puts its own there and would call ours too
    try:
        yield
    except BaseException:
        if stopping.stopped() is not None:
            _wait(first=not is_another())
        raise
    finally:
        if not is_another():
            os.environ.pop(FIRST, None)


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _wait(*, first: bool) -> None:
    """The first: for forked processes. Another: for its end, which comes with the first one's."""
    deadline = time.monotonic() + stopping.PATIENCE
    for child in multiprocessing.active_children() if first else ():
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
    if not first and torch.distributed.is_initialized():
        with suppress(Exception):
            torch.distributed.destroy_process_group()  # the first may be waiting for this one in a collective
    while not first and is_another():
        time.sleep(0.1)
