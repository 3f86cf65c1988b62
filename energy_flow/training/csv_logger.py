"""Lightning's CSV logger for runs that may resume."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from energy_flow.tables import write_csv


class ResumableCSVLogger(CSVLogger):
    """Keep the rows of a resumed run, which Lightning's logger deletes. A kill leaves no incomplete file.

    Args:
        save_dir, name, version: as in Lightning; the file is `<save_dir>/<name>/<version>/metrics.csv`.
        purge_step: delete rows of this step and later, because the run logs them again. None: a new run.
    """

    def __init__(self, save_dir: str, name: str, version: str, purge_step: int | None = None) -> None:
        super().__init__(save_dir=save_dir, name=name, version=version)
        self._purge_step = purge_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file; on the first process only."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self._purge_step)
        return self._experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self._purge_step = purge_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Prepare an existing file before the first row: keep its rows up to the step from which the run resumes."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            del lines[-1]  # an incomplete row
        kept = [row for row in csv.DictReader(lines) if int(row["step"]) < (self._purge_step or 0)]
        if kept:
            self.metrics_keys = list(kept[0])
            write_csv(path, kept)
        else:
            path.unlink()

    def save(self) -> None:
        """Append the new rows, all or none: on a full disk, the next row would continue an incomplete one."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        keys = sorted({*self.metrics_keys, *(key for row in self.metrics for key in row)})
        if keys == self.metrics_keys and path.is_file():
            _append(path, keys, self.metrics)
        else:
            write_csv(path, [{key: row.get(key) for key in keys} for row in [*_rows(path), *self.metrics]])
        self.metrics, self.metrics_keys = [], keys


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, fieldnames: list[str], rows: list[dict[str, Any]]) -> None:
    size = path.stat().st_size
    try:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, fieldnames).writerows(rows)
    except OSError:
        os.truncate(path, size)
        raise
