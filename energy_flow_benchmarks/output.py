"""Show and write the results of a benchmark: the screen, `benchmark.json` and `benchmark.md`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from energy_flow.tables import markdown_table, rich_table
from energy_flow_benchmarks.findings import Findings, Grid, Row
from energy_flow_benchmarks.machine import MachineValue

COLUMNS = ("case", "size", "variant", "time", "peak memory", "ratio", "share of the rate", "count")
ALWAYS = 6  # the first columns are shown even where they are empty
AT_THE_TOP = ("date", "command")  # of the machine's values
LONG = 60  # characters of a cell that needs several lines, and so rules between the rows
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def write(folder: Path, machine: Mapping[str, MachineValue], findings: Findings) -> None:
    """Write `benchmark.json` (machine and rows) and `benchmark.md` (all results, dated) into a folder."""
    rows = [dataclasses.asdict(row) for row in findings.rows]
    (folder / "benchmark.json").write_text(json.dumps({"machine": dict(machine), "rows": rows}, indent=2) + "\n")
    (folder / "benchmark.md").write_text(markdown(machine, findings))


def markdown(machine: Mapping[str, MachineValue], findings: Findings) -> str:
    """Return the results as a page of their own."""
    about = [f"- {key}: {value}" for key, value in machine.items() if value is not None and key not in AT_THE_TOP]
    grids = (*findings.grids, _measurements(findings.rows))
    parts = [
        f"# benchmark={findings.rows[0].benchmark}, {machine['date']}",
        f"```\n{machine['command']}\n```",
        "\n".join(about),
        "\n".join(f"- {note}" for note in findings.notes),
        "![measurements](benchmark.png)",
        *(f"## {grid.title}\n\n{markdown_table(grid.columns, grid.lines)}" for grid in grids),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def show(console: Console, machine: Mapping[str, MachineValue], findings: Findings) -> None:
    """Print the results."""
    for grid in (_measurements(findings.rows), *findings.grids):
        long = any(len(cell) > LONG for line in grid.lines for cell in line)
        left = [column for column in grid.columns if column not in ("size", *COLUMNS[3:])]
        console.print(
            rich_table(grid.columns, grid.lines, title=grid.title, left=left, wrap=grid.columns, show_lines=long)
        )
    for note in findings.notes:
        console.print(note, highlight=False, markup=False)
    about = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None and key != "command")
    console.print(about, style="dim", highlight=False, markup=False)


def in_seconds(value: float | None) -> str:
    """Write a time: "12.3 ms"; "-" for None."""
    return _in_units(value, TIME_UNITS)


def in_bytes(value: float | None) -> str:
    """Write an amount of memory: "1.5 GiB"; "-" for None."""
    return _in_units(value, BYTE_UNITS)


def _in_units(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    """Write three digits, in the largest unit that leaves at least one digit before the point."""
    if value is None:
        return "-"
    factor, unit = next(((factor, unit) for factor, unit in units if abs(value) >= factor), units[-1])
    number = value / factor
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _measurements(rows: Sequence[Row]) -> Grid:
    lines = [
        (
            row.case,
            f"{row.size:,}",
            row.variant,
            in_seconds(row.seconds),
            in_bytes(row.peak_bytes),
            "-" if row.ratio is None else f"{row.ratio:,.0f}" if row.ratio >= 100 else f"{row.ratio:.3g}",
            "-" if row.share is None else f"{100 * row.share:.3g}%",
            "-" if row.count is None else f"{row.count:,}",
        )
        for row in rows
    ]
    shown = [index for index in range(len(COLUMNS)) if index < ALWAYS or any(line[index] != "-" for line in lines)]
    columns, *kept = (tuple(line[index] for index in shown) for line in (COLUMNS, *lines))
    return Grid("Measurements", columns, tuple(kept))
