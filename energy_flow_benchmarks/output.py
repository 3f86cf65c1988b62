"""What a benchmark leaves: `benchmark.json`, `benchmark.md` and tables on the screen."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from energy_flow_benchmarks.findings import Findings, Grid, Row
from energy_flow_benchmarks.machine import MachineValue

COLUMNS = ("case", "size", "variant", "time", "peak memory", "ratio", "share of the rate", "count")
ALWAYS = 6  # of these columns are shown even if nothing is in them
SAID = ("date", "command")  # of the machine: they stand at the top of the page
LONG = 60  # a cell of more characters goes over several lines, and lines need rules between them
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def write(folder: Path, machine: Mapping[str, MachineValue], findings: Findings) -> None:
    """Write `benchmark.json` (machine and rows) and `benchmark.md` (all that was found, dated)."""
    rows = [dataclasses.asdict(row) for row in findings.rows]
    (folder / "benchmark.json").write_text(json.dumps({"machine": dict(machine), "rows": rows}, indent=2) + "\n")
    (folder / "benchmark.md").write_text(markdown(machine, findings))


def markdown(machine: Mapping[str, MachineValue], findings: Findings) -> str:
    """All that was found as a page of its own."""
    name = findings.rows[0].benchmark
    about = [f"- {key}: {value}" for key, value in machine.items() if value is not None and key not in SAID]
    parts = [
        f"# benchmark={name}, {machine['date']}",
        f"```\n{machine['command']}\n```",
        "\n".join(about),
        "\n".join(f"- {note}" for note in findings.notes),
        "![measurements](benchmark.png)",
        *(f"## {grid.title}\n\n{_markdown_table(grid)}" for grid in (*findings.grids, _measurements(findings.rows))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def show(console: Console, machine: Mapping[str, MachineValue], findings: Findings) -> None:
    """The same on the screen."""
    for grid in (_measurements(findings.rows), *findings.grids):
        long = any(len(cell) > LONG for line in grid.lines for cell in line)
        table = Table(title=grid.title, title_justify="left", show_lines=long)
        for column in grid.columns:
            right = column in ("size", *COLUMNS[3:])
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for line in grid.lines:
            table.add_row(*line)
        console.print(table, markup=False)
    for note in findings.notes:
        console.print(note, highlight=False, markup=False)
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None and key != "command")
    console.print(where, style="dim", highlight=False, markup=False)


def _measurements(rows: Sequence[Row]) -> Grid:
    lines = [
        (
            row.case,
            f"{row.size:,}",
            row.variant,
            in_units(row.seconds, TIME_UNITS),
            in_units(row.peak_bytes, BYTE_UNITS),
            "-" if row.ratio is None else f"{row.ratio:,.0f}" if row.ratio >= 100 else f"{row.ratio:.3g}",
            "-" if row.share is None else f"{100 * row.share:.3g}%",
            "-" if row.count is None else f"{row.count:,}",
        )
        for row in rows
    ]
    shown = [index for index in range(len(COLUMNS)) if index < ALWAYS or any(line[index] != "-" for line in lines)]
    return Grid(
        "Measurements",
        tuple(COLUMNS[index] for index in shown),
        tuple(tuple(line[index] for index in shown) for line in lines),
    )


def in_units(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and the largest unit that leaves at least one before the point; - for None."""
    if value is None:
        return "-"
    factor, unit = next(((factor, unit) for factor, unit in units if abs(value) >= factor), units[-1])
    number = value / factor
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _markdown_table(grid: Grid) -> str:
    lines = [grid.columns, ("---",) * len(grid.columns), *grid.lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
