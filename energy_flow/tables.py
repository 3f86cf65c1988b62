"""Text output: tables for the screen, as Markdown and as CSV; plain lines.

A table is a list of column headings and a list of rows, each with one cell per column.
"""

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from energy_flow.atomic import atomic_write


def rich_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
    left: Collection[str] = (),
    wrap: Collection[str] = (),
    styles: Sequence[str] = (),
    rules: Collection[int] = (),
    show_lines: bool = False,
) -> Table:
    """Build a table for the screen. All texts are shown as they are, also those that look like rich markup.

    Args:
        left: headings of left-aligned columns; the others are right-aligned.
        wrap: headings of columns whose cells may take several lines on a narrow screen.
        styles: a rich style per row, such as `bold`; empty: no styles.
        rules: row numbers that get a horizontal rule above them; `show_lines`: all rows get one.
    """
    table = Table(show_lines=show_lines, title_justify="left", caption_justify="left")
    table.title = None if title is None else Text(title, style="table.title")
    table.caption = None if caption is None else Text(caption, style="table.caption")
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in left else "right"
        table.add_column(Text(name), justify=justify, no_wrap=name not in wrap, overflow="fold")
    for number, cells in enumerate(rows):
        if number in rules:
            table.add_section()
        table.add_row(*map(Text, cells), style=styles[number] if styles else "")
    return table


def print_text(console: Console, text: str) -> None:
    """Print text as it is: without markup, highlighting or line wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as Markdown lines, without a final newline; a `|` in a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, completely or not at all. The columns are all keys, in order of first occurrence.

    A missing value or None is an empty cell; a float is written with all its digits.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())
