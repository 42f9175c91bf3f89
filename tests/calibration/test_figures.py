"""The figures of a fit: nothing before the first, and no error for a disk that is full."""

import logging

from lit_binq.calibration.figures import FitFigures


def test_the_folder_comes_with_the_first_figures(tmp_path):
    figures = FitFigures(tmp_path, name="logs")
    assert figures.experiment is None
    figures.log_hyperparams({"seed": 3})
    figures.save()
    figures.finalize("failed")
    assert list(tmp_path.iterdir()) == []
    figures.log_metrics({"loss": 1.0}, 0)
    figures.finalize("success")
    folder = tmp_path / "logs" / "version_0"
    assert (folder / "hparams.yaml").read_text() == "seed: 3\n"
    assert (folder / "metrics.csv").read_text().splitlines() == ["loss,step", "1.0,0"]


def test_figures_that_cannot_be_written_do_not_end_a_fit(tmp_path, caplog):
    (tmp_path / "logs").write_text("in the way")
    figures = FitFigures(tmp_path, name="logs", version=0)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            figures.log_metrics({"loss": 1.0}, step)
            figures.save()
        figures.finalize("failed")
    assert [record.message.split(":")[0] for record in caplog.records] == ["trainer.logger"]
