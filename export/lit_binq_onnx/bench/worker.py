"""One candidate in a process of its own: `python -m lit_binq_onnx.bench.worker SETTING`, driven over its pipes.

SETTING is a `Setting` as JSON. Requests come as lines of JSON on standard input, each is answered by one on standard
output:

    (at the start)                          {"load_seconds", "import_seconds", "rss", "peak", "anon", "mapped"}
    {"do": "prefill", "ids": [...]}         {"seconds", "rss", ...}      an empty cache first, not timed
    {"do": "decode", "steps": 32}           {"seconds", ..., "tokens"}      from the context's end, always

The process ends with its input. What fails is answered with {"error": one line}, and ends it too. Whatever an engine
prints goes to standard error.

It lives beside the command and not in lit_binq_onnx because importing that package brings onnx with it, some 13 MB
resident that other programs' processes would be charged with.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from lit_binq_onnx.bench.engines import ENGINES, IMPORTS, Engine, Setting


def resident_memory(status: Path = Path("/proc/self/status")) -> dict[str, int | None]:
    """What this process holds, bytes: `rss` now, `peak` at most, and rss apart; None where the system does not say.

    `anon` is what no file is behind, which the system cannot drop. `mapped` are pages of files (weights that were not
    copied, code): they are there since they were read once, and the system takes them when it needs the memory.
    """
    found: dict[str, int | None] = {"rss": None, "peak": None, "anon": None, "mapped": None}
    names = {"VmRSS:": "rss", "VmHWM:": "peak", "RssAnon:": "anon", "RssFile:": "mapped"}
    try:
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            word, *rest = line.split() or [""]
            if word in names:
                found[names[word]] = int(rest[0]) * 1024  # "kB" in the file are KiB
    except OSError:
        pass
    return found


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Do one thing and time it."""
    if request["do"] == "prefill":
        engine.reset()
        began = time.perf_counter()
        engine.prefill(request["ids"])
        return {"seconds": time.perf_counter() - began}
    engine.rewind()
    began = time.perf_counter()
    tokens = engine.decode(request["steps"])
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def serve(setting: Setting, requests: IO[str], answers: IO[str]) -> None:
    """Open the model and answer until the requests end."""

    def reply(values: dict[str, Any]) -> None:
        answers.write(json.dumps({**values, **resident_memory()}) + "\n")
        answers.flush()

    try:
        began = time.perf_counter()
        importlib.import_module(IMPORTS[setting.engine])
        imported = time.perf_counter()
        engine = ENGINES[setting.engine](setting)
        reply({"load_seconds": time.perf_counter() - imported, "import_seconds": imported - began})
        for line in requests:
            reply(_answer(engine, json.loads(line)))
    except Exception as error:  # every program raises its own kinds; the driver shows what it was
        reply({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


class WorkerFailed(Exception):
    """A candidate's process has failed; the message says how in one line."""


class Worker:
    """The driver's end: starts the process and asks it. A context: the process ends with it.

    Args:
        setting: what to open.

    Attributes:
        started: the process's first answer.

    Raises:
        WorkerFailed: the model cannot be opened.
    """

    def __init__(self, setting: Setting) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by `close`
        # Programs that ask OpenMP for threads are given as many; ONNX Runtime has its own option.
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lit_binq_onnx.bench.worker", json.dumps(dataclasses.asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            self.started = self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [text.strip() for text in self._log.read().splitlines() if text.strip()]
            raise WorkerFailed(f"its process ended with {code}" + (f" ({said[-1][:200]})" if said else ""))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerFailed: the process answers with an error, or is gone.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said last is still to be read
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that must be put away
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that was never read
                    pipe.close()
        self._log.close()


def _main() -> None:
    # Engines may print, also from C: what was standard output is kept for the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Setting(**json.loads(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    _main()
