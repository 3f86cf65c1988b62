"""Tables: plain text without markup, narrow screens, Markdown escapes, complete CSV files."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from energy_flow.tables import markdown_table, rich_table, write_csv

COLUMNS = ["method", "MRR", "note"]
ROWS = [["ridge", "0.500", "a | b"], ["[bold]", "0.2", ""]]


def shown(width: int = 60, **options: object) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(COLUMNS, ROWS, **options))  # type: ignore[arg-type]
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_cells_and_titles_are_no_markup() -> None:
    lines = shown(title="[red]", caption="[/]", left=["method", "note"])
    assert lines[0].strip() == "[red]"
    assert lines[-1].strip() == "[/]"
    assert lines[4] == "│ ridge  │ 0.500 │ a | b │"
    assert lines[5] == "│ [bold] │   0.2 │       │"


def test_rules_stand_above_their_rows() -> None:
    assert [line[0] for line in shown(rules=[1])] == ["┏", "┃", "┡", "│", "├", "│", "└"]


def test_only_wrapped_columns_get_narrower() -> None:
    lines = shown(width=24, left=["method"], wrap=["note"])
    assert max(map(len, lines)) <= 24
    assert all(any(cell in line for line in lines) for cell in ("ridge", "0.500", "[bold]"))


def test_markdown_escapes_the_column_separator() -> None:
    assert markdown_table(COLUMNS, ROWS).splitlines() == [
        "| method | MRR | note |",
        "| --- | --- | --- |",
        "| ridge | 0.500 | a \\| b |",
        "| [bold] | 0.2 |  |",
    ]


def test_csv_has_all_keys_and_all_digits(tmp_path: Path) -> None:
    rows = [{"job": "0", "mrr": 1 / 3}, {"job": "1", "error": "a, b", "mrr": None}]
    write_csv(tmp_path / "found.csv", rows)
    first, second = csv.DictReader((tmp_path / "found.csv").open(newline=""))
    assert list(first) == ["job", "mrr", "error"]
    assert float(first["mrr"]) == 1 / 3
    assert second == {"job": "1", "mrr": "", "error": "a, b"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "found.csv", [{"job": "0"}])
    with pytest.raises(RuntimeError, match="no text"):
        write_csv(tmp_path / "found.csv", [{"job": Unprintable()}])
    assert (tmp_path / "found.csv").read_text().split() == ["job", "0"]


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")
