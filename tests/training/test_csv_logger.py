"""On a full disk the CSV file has complete rows, each once."""

import csv
import signal
from pathlib import Path

import pytest

from energy_flow.training.csv_logger import ResumableCSVLogger
from tests.checkpoints.test_io import room


def steps(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["loss", "another"], ids=["same columns", "a new column"])
def test_rows_that_do_not_fit_are_written_later(tmp_path: Path, name: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python's default
    logger = ResumableCSVLogger(str(tmp_path), "", "csv")
    file = tmp_path / "csv" / "metrics.csv"
    logger.log_metrics({"loss": 0.5}, 1)
    logger.save()
    before = file.read_bytes()
    logger.log_metrics({name: 0.25}, 2)
    with room(len(before) + 3), pytest.raises(OSError, match="File too large"):
        logger.save()
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["metrics.csv"]
    logger.log_metrics({"loss": 0.125, "third": 1.0}, 3)
    logger.save()
    assert steps(file) == ["1", "2", "3"]
    going_on = ResumableCSVLogger(str(tmp_path), "", "csv", purge_step=3)
    going_on.log_metrics({"loss": 0.0}, 3)
    going_on.save()
    assert steps(file) == ["1", "2", "3"]
