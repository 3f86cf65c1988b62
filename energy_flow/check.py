"""Inspect data before training: python -m energy_flow.check [data=...]"""

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console

from energy_flow.atomic import atomic_write
from energy_flow.data import read_data_settings
from energy_flow.data.inspection import DataReport, SideReport, SplitReport, inspect
from energy_flow.errors import DataError
from energy_flow.runs.application import application
from energy_flow.settings import ProgramSettings, read
from energy_flow.tables import print_text, rich_table


class CheckSettings(ProgramSettings):
    """The whole config of a check."""

    seed: int = Field(ge=0)
    optimized_metric: str
    data: dict[str, Any]


def check(config: dict[str, Any]) -> None:
    """Read a data set once, show the findings and write them to `check.json`.

    Raises:
        DataError: training would refuse the data; the message has all reasons.
    """
    settings = read(CheckSettings, config, "")
    console, started = Console(), time.perf_counter()
    report = inspect(read_data_settings(config["data"]))
    seconds = time.perf_counter() - started
    path = Path(settings.paths.output_dir, "check.json")
    atomic_write(path, json.dumps({**report.as_json(), "seconds": seconds}, indent=2) + "\n")
    show(report, console)
    for warning in report.warnings:
        print_text(console, f"warning: {warning}")
    speed = report.num_bytes / 1e9 / seconds
    print_text(console, f"read {report.num_bytes / 1e6:,.1f} MB in {seconds:.2f} s, {speed:.2f} GB/s")
    print_text(console, f"written: {path}")
    if report.refused:
        raise DataError("training would refuse these data:\n" + "\n".join(f"  {line}" for line in report.refused))
    print_text(console, "training would accept these data")


def show(report: DataReport, console: Console) -> None:
    """Print a table with a column per side of a split, and a table of the rows that splits share."""
    if report.splits:
        sides = {
            f"{split}\n{side}": _cells(found, values)
            for split, found in report.splits.items()
            for side, values in found.sides.items()
        }
        names = list(next(iter(sides.values())))
        rows = [[name, *(cells[name] for cells in sides.values())] for name in names]
        console.print(rich_table(["", *sides], rows, title="Data", left=[""]))
    if report.shared:
        headings = ["of", "in", "source", "target", "pair"]
        rows = [[*splits, *(f"{found.count:,}" for found in sides.values())] for splits, sides in report.shared.items()]
        console.print(rich_table(headings, rows, title="Rows shared between splits", left=["of", "in"]))


def _cells(split: SplitReport, side: SideReport) -> dict[str, str]:
    return {
        "rows": f"{split.rows:,}",
        "dimension": str(split.dim),
        "stored as": side.dtype,
        "NaN or Inf": f"{side.not_finite:,}",
        "bad scales": f"{side.bad_scales:,}",
        "zero rows": f"{side.zero_rows:,}",
        "duplicates": f"{side.copies.count:,}",
        "duplicate pairs": f"{split.pair_copies.count:,}",
        "far-off norms": f"{side.far_off:,}",
        "constant columns": f"{len(side.constant_columns):,}",
        "norm, min": f"{side.norm_min:.4g}",
        "norm, median": f"{side.norm_median:.4g}",
        "norm, max": f"{side.norm_max:.4g}",
        "rms": f"{side.rms:.4g}",
    }


main = application("check")(check)

if __name__ == "__main__":
    main()
