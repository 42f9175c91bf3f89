"""The figures of a fit, as CSV."""

import logging
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)


class FitFigures(CSVLogger):
    """Lightning's, but that its folder is made with the first figures: a fit that is refused leaves nothing behind.

    Figures that cannot be written are given up with a warning: they are not worth a fit.
    """

    _first = _lost = False
    _options: Any = None

    @property
    def experiment(self) -> Any:
        """The writer; None before the first figures."""
        if self._first and self._experiment is None:
            self._experiment = ExperimentWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Remember them."""
        self._options = params

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write figures, the options before the first."""
        try:
            if not self._first:
                self._first = True
                super().log_hyperparams(self._options)
            if not self._lost:
                super().log_metrics(metrics, step)
        except OSError as error:
            self._give_up(error)

    @rank_zero_only
    def save(self) -> None:
        """Write what is not written yet."""
        try:
            if self._first and not self._lost:
                super().save()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._lost = True
        log.warning("trainer.logger: figures are no longer written to %s (%s)", self.log_dir, error.strerror or error)
