"""A comparison as files and as a table: `comparison.csv`, `comparison.md`, `comparison.png`."""

import csv
import io
from pathlib import Path

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from energy_flow.atomic import write_whole
from energy_flow.comparison.compare import Comparison, Method
from energy_flow.metrics.bootstrap import LEVEL, Interval
from energy_flow.metrics.task import Task
from energy_flow.viz.forest import ForestLine, forest_figure

ABOUT = (
    f"Intervals: {LEVEL:.0%}, bootstrap over test rows and seeds, differences on the same rows; of one seed alone they "
    "say nothing of other seeds."
)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write all three files into a folder."""
    write_whole(folder / "comparison.csv", _csv(comparison).encode())
    write_whole(folder / "comparison.md", _markdown(comparison).encode())
    picture = io.BytesIO()
    _figure(comparison).savefig(picture, format="png")
    write_whole(folder / "comparison.png", picture.getvalue())


def comparison_table(comparison: Comparison) -> Table:
    """The comparison for the screen; the files have room for more."""
    notes = [f"{method.name}: {_note(method)}" for method in comparison.methods if _note(method)]
    caption = "\n".join([*notes, ABOUT])
    table = Table(title=_title(comparison), title_justify="left", caption=escape(caption), caption_justify="left")
    headings = _headings(comparison)
    lines = [dict(zip(headings, _cells(comparison, method), strict=True)) for method in comparison.methods]
    task = comparison.task
    chosen = ["method", "seeds", task.headings[task.headline], _difference(comparison)]
    for name in chosen:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name in ("method", "seeds"))
    for line, method in zip(lines, comparison.methods, strict=True):
        table.add_row(*(escape(line[name]) for name in chosen), style="dim" if method.is_baseline else "")
    return table


def _title(comparison: Comparison) -> str:
    models = sum(not method.is_baseline for method in comparison.methods)
    return f"Comparison of {models} model{'s' if models != 1 else ''}"


def _headings(comparison: Comparison) -> list[str]:
    task = comparison.task
    others = [task.headings[metric] for metric in task.summary if metric != task.headline]
    return [
        "method",
        "seeds",
        task.headings[task.headline],
        "each seed",
        _difference(comparison),
        *others,
        "parameters",
        "fit seconds",
        "note",
    ]


def _difference(comparison: Comparison) -> str:
    return f"difference to {comparison.reference}"


def _cells(comparison: Comparison, method: Method) -> list[str]:
    task, metrics = comparison.task, method.metrics
    others = [_shown(task, metric, metrics[metric]) for metric in task.summary if metric != task.headline]
    return [
        method.name,
        str(len(method.headlines)),
        _interval(task, method.mean),
        ", ".join(task.shown(task.headline, value) for value in method.headlines) or "-",
        _interval(task, method.difference, signed=True),
        *others,
        "-" if metrics["params"] is None else f"{metrics['params']:,.0f}",
        "-" if metrics["fit_seconds"] is None else f"{metrics['fit_seconds']:.1f}",
        _note(method),
    ]


def _note(method: Method) -> str:
    missing = f"missing: {'; '.join(method.missing)}" if method.missing else ""
    return "; ".join(part for part in (method.note, missing) if part)


def _markdown(comparison: Comparison) -> str:
    headings = _headings(comparison)
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(_cells(comparison, method)) + " |" for method in comparison.methods]
    return "\n".join([f"# {_title(comparison)}", "", *lines, "", ABOUT, "", "![differences](comparison.png)", ""])


def _csv(comparison: Comparison) -> str:
    text = io.StringIO(newline="")
    lines = [_line(comparison.task, method) for method in comparison.methods]
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(task: Task, method: Method) -> dict[str, object]:
    """A line of the .csv: numbers in full."""
    return {
        "method": method.name,
        "kind": "baseline" if method.is_baseline else "model",
        "seeds": " ".join(map(str, method.seeds)),
        "missing": "; ".join(method.missing),
        f"{task.headline}_of_seeds": " ".join(map(repr, method.headlines)),
        **_bounds(task.headline, method.mean),
        **_bounds("difference", method.difference),
        **method.metrics,
        "note": method.note,
    }


def _bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    bounds = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), bounds, strict=True))


def _figure(comparison: Comparison) -> Figure:
    task = comparison.task
    lines = [_forest_line(comparison, method) for method in comparison.methods]
    return forest_figure(
        lines,
        title=f"{_title(comparison)}: {task.headings[task.headline]} on the test split",
        label=f"difference in {task.headings[task.headline]} to {comparison.reference}, {LEVEL:.0%} interval",
        lower_is_better=task.lower_is_better,
        kinds=("model", "baseline"),
    )


def _forest_line(comparison: Comparison, method: Method) -> ForestLine:
    found, task = method.difference, comparison.task
    if found is not None:
        shown = _interval(task, found, signed=True)
        return ForestLine(method.name, (found.mean, found.low, found.high), shown, method.is_baseline)
    shown = _interval(task, method.mean) if method.name == comparison.reference else method.note
    return ForestLine(method.name, None, shown, method.is_baseline)


def _interval(task: Task, interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    digits = f"{sign}#.3g" if task.lower_is_better else f"{sign}.4f"
    return f"{interval.mean:{digits}} [{interval.low:{digits}}, {interval.high:{digits}}]"


def _shown(task: Task, metric: str, value: float | None) -> str:
    return "-" if value is None else task.shown(metric, value)
