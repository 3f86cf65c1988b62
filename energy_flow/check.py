"""Look at data before they are trained on: python -m energy_flow.check [data=...]"""

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from energy_flow.atomic import write_whole
from energy_flow.data import read_data_settings
from energy_flow.data.inspection import DataReport, SideReport, SplitReport, inspect
from energy_flow.errors import DataError
from energy_flow.runs.application import application
from energy_flow.settings import PathSettings, Settings, read


class CheckSettings(Settings):
    """The whole config of a check."""

    task_name: str
    seed: int = Field(ge=0)
    optimized_metric: str
    data: dict[str, Any]
    paths: PathSettings


def check(config: dict[str, Any]) -> None:
    """Read a data set once; show what it is like and write it to `check.json`.

    Raises:
        DataError: training would refuse it; says why.
    """
    settings = read(CheckSettings, config, "")
    console, started = Console(), time.perf_counter()
    report = inspect(read_data_settings(config["data"]))
    seconds = time.perf_counter() - started
    path = Path(settings.paths.output_dir, "check.json")
    write_whole(path, (json.dumps({**report.as_json(), "seconds": seconds}, indent=2) + "\n").encode())
    show(report, console)

    def say(what: str) -> None:
        console.print(what, highlight=False, markup=False, soft_wrap=True)

    for warning in report.warnings:
        say(f"warning: {warning}")
    say(f"read {report.num_bytes / 1e6:,.1f} MB in {seconds:.2f} s, {report.num_bytes / 1e9 / seconds:.2f} GB/s")
    say(f"written: {path}")
    if report.refused:
        raise DataError("training would refuse these data:\n" + "\n".join(f"  {line}" for line in report.refused))
    say("training would take these data")


def show(report: DataReport, console: Console) -> None:
    """What was found as tables: a column per side of a split, and what splits have in common."""
    if report.splits:
        table = Table(title="Data", title_justify="left")
        table.add_column("", no_wrap=True)
        sides = [
            (f"{split}\n{side}", found, values)
            for split, found in report.splits.items()
            for side, values in found.sides.items()
        ]
        columns = [_cells(found, values) for _, found, values in sides]
        for heading, _, _ in sides:
            table.add_column(heading, justify="right", no_wrap=True)
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
        console.print(table)
    if report.shared:
        shared = Table(title="Rows shared between splits", title_justify="left")
        for heading in ("of", "in", "source", "target", "pair"):
            shared.add_column(heading, justify="left" if heading in ("of", "in") else "right")
        for (split, other), copies in report.shared.items():
            shared.add_row(split, other, *(f"{found.count:,}" for found in copies.values()))
        console.print(shared)


def _cells(split: SplitReport, side: SideReport) -> dict[str, str]:
    numbers = {
        "norm, min": side.norm_min,
        "norm, median": side.norm_median,
        "norm, max": side.norm_max,
        "rms": side.rms,
    }
    counts = {
        "NaN or Inf": side.not_finite,
        "bad scales": side.bad_scales,
        "zero rows": side.zero_rows,
        "copies": side.copies.count,
        "copied pairs": split.pair_copies.count,
        "far-off norms": side.far_off,
        "constant columns": len(side.constant_columns),
    }
    return {
        "rows": f"{split.rows:,}",
        "dimension": str(split.dim),
        "stored as": side.dtype,
        **{name: f"{count:,}" for name, count in counts.items()},
        **{name: f"{value:.4g}" for name, value in numbers.items()},
    }


@application("check")
def main(config: dict[str, Any]) -> None:
    """Entry point."""
    check(config)


if __name__ == "__main__":
    main()
