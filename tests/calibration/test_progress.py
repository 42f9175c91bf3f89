"""The progress bar: what a terminal shows, and what a file does."""

import io
import logging
import sys

import pytest
from conftest import tiny_model

from fitting import fit
from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.calibration.progress import StageProgress


class Screen(io.StringIO):
    """Standard error that is, or is not, a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_stages_are_named_and_lines_of_the_log_stand_alone(terminal, tmp_path, tokenizer, text_file, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("lit_binq.calibration.progress.INTERVAL", 0.0)
    handler = logging.StreamHandler(screen)
    root, level = logging.getLogger(), logging.getLogger("lit_binq").level
    root.addHandler(handler)
    logging.getLogger("lit_binq").setLevel(logging.INFO)
    try:
        fit(
            tmp_path / "model",
            text_file,
            tmp_path / "packed",
            callbacks=[StageProgress()],
            tuning=BlockTuning(epochs=2),
            end_to_end=ModelTuning(epochs=1),
            trainer={"enable_progress_bar": True},
        )
    finally:
        root.removeHandler(handler)
        logging.getLogger("lit_binq").setLevel(level)
    assert handler.filters == []
    shown = screen.getvalue()
    assert ("block 2 of 2, epoch 2 of 2, 0:00 left + model stage" in shown) == terminal
    assert ("model, epoch 1 of 1" in shown) == terminal
    # What is left when every line that was taken back is gone: those of the log, each whole.
    kept = [line.rpartition("\r\x1b[K")[2] for line in shown.split("\n")] if terminal else shown.split("\n")
    assert [line for line in kept if "\x1b" in line or "[#" in line] == []
    assert sum(line.startswith("stage ") for line in kept) == 3
