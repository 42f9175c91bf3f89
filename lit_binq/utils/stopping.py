"""Being told to stop: SIGTERM, Ctrl-C and a closed terminal end a command where it stands.

The signal becomes an exception at once, which removes what is half done on its way out, except within `whole`, where it
waits. What swallows exceptions (Python does so while it collects garbage) cannot swallow the request: `ask` raises it
again. Further signals change nothing, but for a Ctrl-C after a while: it ends the process at once. So does a thread
that watches where the main thread, inside a library's call, does not get to handle the signal: waiting for other nodes.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 10.0
"""Seconds after which a second Ctrl-C ends the process without tidying up."""

DEAF = 30.0
"""Seconds that a call into a library may go on after a signal: a block's largest solve takes less."""


class Stopped(SystemExit):
    """A signal asked to stop. `code` is what shells expect: 128 and the signal's number, 143 for SIGTERM.

    Args:
        number: the signal.
        hint: how to go on, for the last line.
    """

    def __init__(self, number: int, hint: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.hint = number, hint

    def __str__(self) -> str:
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}{self.hint and f'; {self.hint}'}"


class _State:
    """What this process was told."""

    listening = False
    number: int | None = None
    since = 0.0
    whole = 0
    heralds: tuple[Callable[[int], None], ...] = ()
    hint: Callable[[], str] | None = None


def stopped() -> int | None:
    """The signal that asked to stop, if one did."""
    return _State.number


def handle(number: int, frame: FrameType | None = None) -> None:
    """The signals' handler. Raises Stopped, or leaves that to `whole`."""
    now = time.monotonic()
    if _State.number is not None:
        if number == signal.SIGINT and now - _State.since > PATIENCE:
            os._exit(128 + number)
        return
    _State.number, _State.since = number, now
    for herald in _State.heralds:
        herald(number)
    ask()


def ask() -> None:
    """Raise Stopped if the process was told to stop, unless within `whole`."""
    if _State.number is not None and not _State.whole:
        raise Stopped(_State.number)


@contextmanager
def whole() -> Iterator[None]:
    """Let the body, a short one, come to its end first."""
    _State.whole += 1
    try:
        yield
    finally:
        _State.whole -= 1
    ask()


@contextmanager
def listening(*, last: bool = False) -> Iterator[None]:
    """Handle the signals inside, in the main thread; what is ignored, as in the background of a script, stays so.

    Args:
        last: the process ends behind it: one that was told to stop is deaf to what other processes still tell it.
    """
    before: dict[int, Any] = {}
    pipe: tuple[int, int] | None = None
    _State.number, _State.whole, _State.heralds, _State.hint = None, 0, (), None
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, handle)
        pipe = os.pipe()
        os.set_blocking(pipe[1], False)
        signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(pipe[0],), daemon=True, name="signals").start()
    _State.listening = bool(before)
    try:
        yield
    finally:
        told, _State.number, _State.listening = _State.number, None, False
        if pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(pipe[1])  # ends the thread, which closes the other end
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and told is not None else handler)


def _watch(pipe: int) -> None:
    """End the process if its main thread does not get to handle a signal that the system wrote into the pipe."""
    while numbers := os.read(pipe, 1):
        if numbers[0] in SIGNALS and _State.number is None:
            deadline = time.monotonic() + DEAF
            while _State.listening and _State.number is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if _State.listening and _State.number is None:
                last = Stopped(
                    numbers[0], "; ".join(["a call did not return", *([_State.hint()] if _State.hint else [])])
                )
                print(last, file=sys.stderr, flush=True)
                os._exit(128 + numbers[0])
    os.close(pipe)


def tell(herald: Callable[[int], None]) -> None:
    """Have a function called with the first signal: it tells processes that belong to this one."""
    _State.heralds += (herald,)


def explain(hint: Callable[[], str]) -> None:
    """Have a function say how to go on where nothing else can."""
    _State.hint = hint


def take_back() -> None:
    """Handle SIGTERM again after somebody else began to, if this process is listening."""
    if _State.listening and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle)
