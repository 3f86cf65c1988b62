"""Compare the files of two runs: checkpoints, results, curves."""

import csv
from pathlib import Path

from tests.cli.helpers import read_metrics
from tests.cli.test_resume import checkpoint, differences
from tests.training.runs import scalars

_MEASURED = ("time/", "memory/", "cleanup/", "result/fit_seconds")  # these depend on the machine


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars, without those that depend on the machine."""
    return {tag: points for tag, points in scalars(folder / "tensorboard").items() if not tag.startswith(_MEASURED)}


def rows(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """The same scalars of metrics.csv."""
    found: dict[str, list[tuple[int, str]]] = {}
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key != "step" and not key.startswith(_MEASURED):
                    found.setdefault(key, []).append((int(row["step"]), value))
    return found


def unlike(one: Path, other: Path) -> list[str]:
    """Names of values that are not equal bit for bit in two run folders. Times are left out."""
    found = []
    for name in ("last", "best"):
        found += [f"{name}.ckpt{path}" for path in differences(checkpoint(one, name), checkpoint(other, name))]
    for what, read in (("metrics.json", read_metrics), ("tensorboard", curves), ("csv", rows)):
        left, right = read(one), read(other)
        keys = [key for key in {**left, **right} if key != "fit_seconds"]
        found += [f"{what}: {key}" for key in keys if left.get(key) != right.get(key)]
    return found
