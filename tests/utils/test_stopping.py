"""Signals: a command ends where it stands, with their exit code and one line that says how to go on."""

import logging
import math
import os
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fitting import assert_same
from lit_binq.cli import main as cli
from lit_binq.utils import stopping

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def config(tmp_path: Path, make_source, text_file) -> Path:
    text = {"path": str(text_file)}
    value = {
        "model": {"model": str(make_source(blocks=3)), "packed": str(tmp_path / "packed"), "tuning": {"epochs": 0}},
        "data": {"train": text, "window_length": 48, "windows": 12, "evaluation": {"text": text}}
        | {"eval_windows": 4, "eval_length": 48},
        "checkpoint": {"dirpath": str(tmp_path / "ckpt")},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(value))
    return tmp_path / "fit.yaml"


def run(arguments: list[str], said: Path, patch: Patch = lambda _: None) -> tuple[int, list[str]]:
    """The command in a forked process, which need not import everything again: exit code, lines on standard error."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            sys.stderr = sys.stdout = said.open("w")
            logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stderr)]
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run behind nohup
            with pytest.MonkeyPatch.context() as monkeypatch:
                patch(monkeypatch)
                code = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), said.read_text().splitlines()


def strike(place: str, at: int, number: int = signal.SIGTERM, times: int = 1) -> Patch:
    """Send this process a signal when a function is called for the at-th time, before it does anything."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        holder, _, name = place.rpartition(".")
        owner: Any = pkgutil.resolve_name(holder)
        real, calls = getattr(owner, name), []

        def struck(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, struck)

    return patch


PLACES = {
    "reading text": ("lit_binq.data.module.CalibrationData.setup", 1, 0, "begins again"),
    "loading the model": ("lit_binq.evaluation.module.load_model", 1, 0, "begins again"),
    "a closed form": ("lit_binq.calibration.block_stage.BlockStage._solve", 10, 1, "--ckpt_path"),
    "between blocks": ("lit_binq.calibration.block_stage.BlockStage.enter", 3, 2, "--ckpt_path"),
    "the last writing": ("lit_binq.hub.save_load.save_file", 1, 3, "--ckpt_path"),
    "evaluation": ("lit_binq.evaluation.module.PackedEvaluation._measure", 1, 3, "litbinq validate"),
}


@pytest.mark.grid(1)
@pytest.mark.parametrize("place", PLACES)
def test_a_fit_without_tuning_ends_where_it_stands(place, config, tmp_path):
    where, at, done, words = PLACES[place]
    code, lines = run(["fit", "--config", str(config)], tmp_path / "said", strike(where, at))
    assert code == 143, lines
    assert not [line for line in lines if "Traceback" in line]
    assert lines[-1].startswith("litbinq fit: stopped by SIGTERM; ")
    assert words in lines[-1]
    assert sum(line.startswith("stage ") for line in lines) == done
    left = {p.name for p in tmp_path.iterdir()} - {"said", "fit.yaml", "llama-model"}
    assert left == ({"ckpt"} if done else set()) | ({"packed", "options.yaml"} if place == "evaluation" else set())
    if "--ckpt_path" in words:
        checkpoint = tmp_path / "ckpt" / "last.ckpt"
        assert f"behind stage {done} " in lines[-1]
        assert str(checkpoint) in lines[-1]
        assert run(["fit", "--config", str(config), "--ckpt_path", str(checkpoint)], tmp_path / "said")[0] == 0
        whole = ["--model.packed", str(tmp_path / "whole"), "--checkpoint.dirpath", str(tmp_path / "other")]
        assert run(["fit", "--config", str(config), *whole], tmp_path / "said")[0] == 0
        assert_same(tmp_path / "packed", tmp_path / "whole")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")])
def test_other_signals_and_a_second_one(number, name, config, tmp_path):
    where, at, *_ = PLACES["a closed form"]
    code, lines = run(["fit", "--config", str(config)], tmp_path / "said", strike(where, at, number, times=3))
    assert code == 128 + number, lines
    assert lines[-1].startswith(f"litbinq fit: stopped by {name}; go on behind stage 1")
    assert not [line for line in lines if "Traceback" in line or "KeyboardInterrupt" in line]


def test_a_signal_while_a_stage_is_tuned(config, tmp_path):
    arguments = ["fit", "--config", str(config), "--model.tuning.epochs", "2", "--model.end_to_end.epochs", "1"]
    patch = strike("lit_binq.calibration.module.BinQCalibration.training_step", 9)
    code, lines = run(arguments, tmp_path / "said", patch)
    assert code == 143, lines
    assert "go on behind stage 1 " in lines[-1]


def test_a_checkpoint_is_written_to_its_end_first(config, tmp_path):
    code, lines = run(
        ["fit", "--config", str(config)], tmp_path / "said", strike("lit_binq.calibration.checkpoint.torch.save", 2)
    )
    assert code == 143, lines
    assert "go on behind stage 2 " in lines[-1]
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["lit_binq"]["stage"] == 2


def test_a_request_that_is_swallowed_is_raised_again(config, tmp_path):
    """Python drops exceptions that a signal raises while it runs a destructor."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from lit_binq.calibration.block_stage import BlockStage

        class Gone:
            def __del__(self) -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)  # the handler runs in here

        real = BlockStage._solve

        def solve(self: Any, *args: Any, **options: Any) -> Any:
            Gone()
            return real(self, *args, **options)

        monkeypatch.setattr(BlockStage, "_solve", solve)

    code, lines = run(["fit", "--config", str(config)], tmp_path / "said", patch)
    assert code == 143, lines
    assert not [line for line in lines if line.startswith("stage ")]


def test_other_commands_too(tmp_path):
    patch = strike("lit_binq.utils.places.require_folder", 1)
    code, lines = run(["export", str(tmp_path), str(tmp_path / "out")], tmp_path / "said", patch)
    assert (code, lines) == (143, ["litbinq export: stopped by SIGTERM"])


def test_ignored_signals_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with stopping.listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is stopping.handle
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_within_a_write_a_signal_waits():
    done = []

    def write() -> None:
        with stopping.whole():
            with stopping.whole():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append(1)
            done.append(2)
        done.append(3)

    with stopping.listening(), pytest.raises(stopping.Stopped) as caught:
        write()
    assert done == [1, 2]
    assert caught.value.code == 143


def test_a_call_that_does_not_return_is_ended_too():
    """Waiting for other nodes, say: the main thread is inside a library and cannot handle the signal."""
    script = (
        "import ctypes, os, threading; from lit_binq.utils import stopping\nstopping.DEAF = 0.5\n"
        "with stopping.listening():\n"
        "    stopping.explain(lambda: 'go on')\n"
        "    threading.Timer(0.2, lambda: os.kill(os.getpid(), 15)).start()\n"
        "    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    while True:\n        libc.pthread_mutex_lock(lock)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (143, "stopped by SIGTERM; a call did not return; go on\n")


@pytest.mark.parametrize(("ends", "code"), [("raise stopping.Stopped(15)", 143), ("return 128 + 13", 141)])
def test_what_libraries_do_at_the_end_changes_no_exit_code(ends, code, tmp_path):
    """C++ aborts where threads still run while the interpreter is taken down; Python's own exit functions do run."""
    script = (
        "import atexit, ctypes, pathlib\nfrom lit_binq.cli import main as cli\nfrom lit_binq.utils import stopping\n"
        f"def ended(arguments):\n    try:\n        {ends}\n    except stopping.Stopped as stopped:\n"
        "        return cli._say('fit', stopped)\n"
        "libc = ctypes.CDLL(None)\nlibc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
        f"atexit.register(pathlib.Path({str(tmp_path / 'tidied')!r}).touch)\ncli._main = ended\ncli.command()\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == code, ran.stderr
    assert (tmp_path / "tidied").exists()


@pytest.mark.slow
def test_a_comparison_ends_its_fit_first(config, tmp_path):
    """`litbinq compare` told to stop: the fit it runs is told too, and has the time to put its things away."""
    from lit_binq.compare.runner import fit

    process = os.fork()
    if process == 0:
        with stopping.listening():
            try:
                fit(config, tmp_path / "log")
            except stopping.Stopped as stopped:
                os._exit(int(str(stopped.code)))
        os._exit(0)
    while not (tmp_path / "log").exists() or "calibration:" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("litbinq fit: stopped by SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "to"), [("ddp", "first"), ("ddp", "another"), ("ddp_spawn", "first")])
def test_all_processes_of_a_run_end_together(to, strategy, config, tmp_path):
    """A signal to the first process or to another one, while a block is tuned: one line, and nobody is left."""
    devices = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    tuned = ["--data.windows", "20", "--data.held_out", "0.2", "--model.tuning", '{"epochs": 99999}']
    command = [sys.executable, "-m", "lit_binq", "fit", "--config", str(config), *devices, *tuned]
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen(command, stderr=said, stdout=said)
        try:
            others, settled = list[int](), math.inf
            while time.monotonic() < settled:
                found = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
                found = [p for p in found if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()]
                if len(found) > len(others):
                    others, settled = [int(p) for p in found], time.monotonic() + 20
                time.sleep(0.2)
                assert first.poll() is None, (tmp_path / "said").read_text()
            os.kill(first.pid if to == "first" else others[-1], signal.SIGTERM)
            code = first.wait(60)
        finally:
            first.kill()
            first.wait()
    lines = (tmp_path / "said").read_text().splitlines()
    time.sleep(1)
    stats = [Path(f"/proc/{p}/stat") for p in others]
    assert code == 143, lines
    assert not [s for s in stats if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"]
    assert code == 143, lines
    assert sum("stopped by SIGTERM" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["block", "model"])
def test_slurm_starts_a_run_again_from_the_last_finished_stage(stage, config, tmp_path, monkeypatch):
    """Lightning answers SLURM's signals: a checkpoint in the middle of a stage, and it asks for the next run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    arguments = ["fit", "--config", str(config), "--model.tuning.epochs", "1", "--model.end_to_end.epochs", "2"]
    assert run([*arguments, "--model.packed", "whole"], tmp_path / "said")[0] == 0
    for name, value in {"NTASKS": 1, "JOB_NAME": "fit", "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    done = 1 if stage == "block" else 3

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from lit_binq.calibration.module import BinQCalibration

        real, calls = BinQCalibration.training_step, []

        def step(self: Any, *args: Any) -> Any:
            if self.stage_index == done:
                calls.append(1)
                for number in {2: [signal.SIGUSR1], 3: [signal.SIGTERM]}.get(len(calls), []):
                    os.kill(os.getpid(), number)
            return real(self, *args)

        monkeypatch.setattr(BinQCalibration, "training_step", step)

    code, lines = run(arguments, tmp_path / "said", patch)
    assert code == 143, lines
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    checkpoints = [p.name for p in tmp_path.glob("hpc_ckpt*")]
    assert checkpoints == ["hpc_ckpt_1.ckpt"]
    code, lines = run(arguments, tmp_path / "said")
    assert code == 0, lines
    assert f"resumed behind stage {done} of 4" in lines
    assert_same(tmp_path / "packed", tmp_path / "whole")
