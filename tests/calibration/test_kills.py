"""A small fit killed at random moments, then resumed: the packed folder must be, bit for bit, that of one left alone.

Killed in turn by SIGKILL, by SIGTERM and by a disk that fills up. Environment variables:

    LIT_BINQ_KILLS         how many, 6 if not given
    LIT_BINQ_KILLS_SEED    seed of the moments, printed
    LIT_BINQ_KILLS_MODEL   checkpoint folder of a real model; a tiny random one if not given
    LIT_BINQ_KILLS_TEXT    text for it
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from fitting import assert_same

COUNT = int(os.environ.get("LIT_BINQ_KILLS", "6"))
SEED = int(os.environ.get("LIT_BINQ_KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
MODEL, TEXT = os.environ.get("LIT_BINQ_KILLS_MODEL"), os.environ.get("LIT_BINQ_KILLS_TEXT")
KINDS = ("SIGKILL", "SIGTERM", "disk full")
DISK = "700m"


class Fit:
    """One fit in a folder of its own: what it writes and where it puts temporary files."""

    def __init__(self, folder: Path, source: Path, text: Path) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.log = folder.with_name(f"{folder.name}.log")  # not on a disk that is full
        self.log.touch()
        tuning = {"epochs": 2}
        read = {"path": str(text)}
        config = {
            "model": {"model": str(source), "packed": str(folder / "packed"), "tuning": tuning}
            | {"end_to_end": {"epochs": 1}, "streams": {"cache": "disk", "cache_dir": str(self.temporary)}}
            | {"diagnostics": {"windows": 1}},
            "data": {"train": read, "window_length": 48, "windows": 10, "held_out": 0.2, "batch_size": 4}
            | {"evaluation": {"text": read}, "eval_windows": 2, "eval_length": 48},
            "checkpoint": {"dirpath": str(folder / "ckpt")},
            "trainer": {"accelerator": "cpu", "devices": 1},
            "results": str(folder / "results.json"),
        }
        (folder / "fit.yaml").write_text(yaml.safe_dump(config))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "lit_binq",
            "fit",
            "--config",
            str(self.folder / "fit.yaml"),
            *arguments,
        ]
        environment = os.environ | {"TMPDIR": str(self.temporary)}
        with self.log.open("ab") as said:
            return subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    def finish(self) -> int:
        """Go on with the checkpoint, if there is one; returns the number of stages that were done already."""
        checkpoint = self.folder / "ckpt" / "last.ckpt"
        before = len(self.said())
        going = checkpoint.exists()
        code = self.start(*(["--ckpt_path", str(checkpoint)] if going else [])).wait()
        lines = self.said()[before:]
        assert code == 0, lines
        resumed = [line for line in lines if line.startswith("resumed behind stage ")]
        assert len(resumed) == going
        return int(resumed[0].split()[3]) if going else 0

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def began(self) -> bool:
        """Whether it has read its text; what comes before, imports, is most of a small fit's time."""
        return any(line.startswith("calibration: ") for line in self.said())

    def left(self) -> set[str]:
        """What is in the folder, but for the fit's own results."""
        names = {p.relative_to(self.folder).as_posix() for p in self.folder.iterdir()}
        names |= {f"tmp/{p.name}" for p in self.temporary.iterdir()}
        names |= {p.relative_to(self.folder).as_posix() for p in (self.folder / "ckpt").glob("*")}
        ours = {"tmp", "fit.yaml", "ckpt", "ckpt/last.ckpt", "packed", "results.json", "diagnostics.json"}
        return names - ours - {"logs", "options.yaml"}


def kill(fit: Fit, kind: str, moment: float) -> str:
    """Start the fit and end it `moment` seconds after it has read its text; returns how it ended."""
    process = fit.start()
    while process.poll() is None and not fit.began():
        time.sleep(0.02)
    filler = fit.folder / "filler"
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        if kind == "disk full":
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
        else:
            process.send_signal(getattr(signal, kind))
    code = process.wait()
    filler.unlink(missing_ok=True)
    last = fit.said()[-1] if fit.said() else ""
    expected = {"SIGKILL": -9, "SIGTERM": 143, "disk full": 1}[kind]
    if code == -signal.SIGTERM and (fit.folder / "results.json").exists():
        return f"exit code {code} behind the end"  # Python itself was ending
    assert code in (0, expected), fit.said()[-20:]
    if code and kind != "SIGKILL":
        assert last.startswith("litbinq fit: "), fit.said()[-20:]
        assert fit.left() == set()
    if code and kind == "SIGTERM":
        assert "stopped by SIGTERM" in last
    if code == 1:
        # Filled before the first block, the preflight says so.
        assert "No space left on device" in last or "preflight: disk at" in last
    return f"exit code {code}"


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path, make_source, text_file):
    source = Path(MODEL) if MODEL else make_source(blocks=4)
    text = Path(TEXT) if TEXT else text_file
    peace = Fit(tmp_path / "peace", source, text)
    process = peace.start()
    while process.poll() is None and not peace.began():
        time.sleep(0.02)
    began = time.monotonic()
    assert process.wait() == 0, peace.said()
    seconds = time.monotonic() - began
    moments = random.Random(SEED)
    print(f"seed {SEED}, {COUNT} kills, {seconds:.1f} s from the text to the end")
    for i in range(COUNT):
        kind, folder = KINDS[i % 3], tmp_path / f"run-{i}"
        folder.mkdir()
        disk = kind == "disk full"
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
        if disk and subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a disk to fill needs a privilege that this process lacks")
        try:
            fit = Fit(folder, source, text)
            moment = moments.uniform(0, seconds)
            ended = kill(fit, kind, moment)
            stages = fit.finish()
            assert_same(folder / "packed", peace.folder / "packed")
            assert fit.left() == set()
            print(f"{i + 1}/{COUNT} {kind} after {moment:.1f} s: {ended}, resumed behind stage {stages}, same bits")
        finally:
            if disk:
                subprocess.run(["umount", "-l", str(folder)], check=True)
