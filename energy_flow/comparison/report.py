"""A comparison as tables for the screen, and as `comparison.csv`, `comparison.md` and `comparison.png`."""

import io
from collections.abc import Mapping
from itertools import chain, groupby
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from energy_flow.atomic import atomic_write
from energy_flow.comparison.compare import MEAN, Comparison, Method, bounds, pairs_of
from energy_flow.metrics.bootstrap import LEVEL, Interval
from energy_flow.metrics.task import Task
from energy_flow.tables import markdown_table, rich_table, write_csv
from energy_flow.viz.forest import ForestLine, forest_figure

ABOUT = (
    f"Intervals: {LEVEL:.0%}, bootstrap over test rows and seeds; differences on the same rows. An interval of one "
    "seed says nothing about other seeds."
)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write `comparison.csv`, `comparison.md` and `comparison.png` of a multirun into a folder."""
    write_csv(folder / "comparison.csv", [_values(comparison, method) for method in comparison.methods.values()])
    atomic_write(folder / "comparison.md", _page(comparison))
    picture = io.BytesIO()
    _figure(comparison).savefig(picture, format="png")
    atomic_write(folder / "comparison.png", picture.getvalue())


def comparison_table(comparison: Comparison) -> Table:
    """The comparison of a multirun for the screen, with the most important columns of the files."""
    methods = comparison.methods.values()
    lines = [_cells(comparison, method) for method in methods]
    chosen = [list(lines[0])[index] for index in (0, 1, 2, 4)]
    notes = [f"{method.name}: {_note(method)}" for method in methods if _note(method)]
    return rich_table(
        chosen,
        [[line[name] for name in chosen] for line in lines],
        title=_title(comparison),
        caption="\n".join([*notes, ABOUT]),
        left=["method"],
        wrap=chosen[2:],
        styles=["dim" if method.is_baseline else "" for method in methods],
    )


def interval_table(comparisons: Mapping[str, Comparison]) -> Table | None:
    """The primary metric of tested models and baselines with its intervals, then the differences of pairs.

    The comparisons are of the same methods, by the heading of their primary metric; the first one selects the pairs.
    None if the methods have no intervals.
    """
    main = next(iter(comparisons.values()))
    if main.num_rows is None:
        return None
    rows = [
        [method.name, *(text for found in comparisons.values() for text in _two_cells(found, found.interval(key)))]
        for key, method in main.methods.items()
    ]
    rules = []
    # All pairs of a section share one method: the single model (index 0), or else the subtracted method (index 1).
    several = MEAN in main.methods
    shared = 1 if several else 0
    for key, pairs in groupby(pairs_of(main), key=lambda pair: pair[shared]):
        rules.append(len(rows))
        name, best = main.methods[key].name, "best baseline" if main.methods[key].is_baseline else "first"
        title = f"minus {name}, the {best}" if several else f"{name} minus"
        rows.append([title, *[""] * (2 * len(comparisons))])
        for pair in pairs:
            cells = [_two_cells(found, found.difference(*pair), "+") for found in comparisons.values()]
            rows.append([f"  {main.methods[pair[1 - shared]].name}", *chain.from_iterable(cells)])
    over = f"{main.num_rows:,} test rows" + (", of the mean also over models" if several else "")
    return rich_table(
        ["method", *(text for heading in comparisons for text in (heading, "interval"))],
        rows,
        title=f"How sure: {LEVEL:.0%} bootstrap intervals over {over}",
        left=["method"],
        wrap=["method"],
        styles=["italic" if number in rules else "" for number in range(len(rows))],
        rules=rules,
    )


def _two_cells(comparison: Comparison, interval: Interval | None, sign: str = "") -> tuple[str, str]:
    if interval is None:
        return "-", "-"

    def shown(value: float) -> str:
        return (sign if value >= 0 else "") + comparison.task.shown(comparison.task.primary, value)

    return shown(interval.mean), f"{shown(interval.low)} to {shown(interval.high)}"


def _title(comparison: Comparison) -> str:
    count = len(comparison.models)
    return f"Comparison of {count} model{'s' if count != 1 else ''}"


def _cells(comparison: Comparison, method: Method) -> dict[str, str]:
    """A row of the table by its headings."""
    task, metrics = comparison.task, method.metrics
    secondary = [(name, metrics[name]) for name in task.secondary]
    return {
        "method": method.name,
        "seeds": str(len(method.primary)),
        task.primary_heading: _in_brackets(task, comparison.interval(method.key)),
        "each seed": ", ".join(task.shown(task.primary, value) for value in method.primary) or "-",
        f"difference to {comparison.reference.name}": _in_brackets(task, _difference(comparison, method), signed=True),
        **{task.headings[name]: "-" if value is None else task.shown(name, value) for name, value in secondary},
        "parameters": "-" if metrics["params"] is None else f"{metrics['params']:,.0f}",
        "fit seconds": "-" if metrics["fit_seconds"] is None else f"{metrics['fit_seconds']:.1f}",
        "note": _note(method),
    }


def _difference(comparison: Comparison, method: Method) -> Interval | None:
    """To the reference; None for the reference itself."""
    reference = comparison.reference
    return None if method is reference else comparison.difference(method.key, reference.key)


def _in_brackets(task: Task, interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    digits = f"{sign}#.3g" if task.lower_is_better else f"{sign}.4f"
    return f"{interval.mean:{digits}} [{interval.low:{digits}}, {interval.high:{digits}}]"


def _note(method: Method) -> str:
    missing = f"missing: {'; '.join(method.missing)}" if method.missing else ""
    return "; ".join(part for part in (method.note, missing) if part)


def _page(comparison: Comparison) -> str:
    rows = [_cells(comparison, method) for method in comparison.methods.values()]
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    return f"# {_title(comparison)}\n\n{table}\n\n{ABOUT}\n\n![differences](comparison.png)\n"


def _values(comparison: Comparison, method: Method) -> dict[str, object]:
    """A row of the .csv: numbers with all their digits."""
    primary = comparison.task.primary
    return {
        "method": method.name,
        "kind": "baseline" if method.is_baseline else "model",
        "seeds": " ".join(map(str, method.seeds)),
        "missing": "; ".join(method.missing),
        f"{primary}_of_seeds": " ".join(map(repr, method.primary)),
        **_mean_and_bounds(primary, comparison.interval(method.key)),
        **_mean_and_bounds("difference", _difference(comparison, method)),
        **method.metrics,
        "note": method.note,
    }


def _mean_and_bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    mean = None if interval is None else interval.mean
    return {name: mean, f"{name}_low": None, f"{name}_high": None, **bounds(name, interval)}


def _figure(comparison: Comparison) -> Figure:
    heading = comparison.task.primary_heading
    return forest_figure(
        [_forest_line(comparison, method) for method in comparison.methods.values()],
        title=f"{_title(comparison)}: {heading} on the test split",
        label=f"difference in {heading} to {comparison.reference.name}, {LEVEL:.0%} interval",
        lower_is_better=comparison.task.lower_is_better,
        kinds=("model", "baseline"),
    )


def _forest_line(comparison: Comparison, method: Method) -> ForestLine:
    difference, task = _difference(comparison, method), comparison.task
    if difference is not None:
        bounds = (difference.mean, difference.low, difference.high)
        return ForestLine(method.name, bounds, _in_brackets(task, difference, signed=True), method.is_baseline)
    is_reference = method is comparison.reference
    shown = _in_brackets(task, comparison.interval(method.key)) if is_reference else method.note
    return ForestLine(method.name, None, shown, method.is_baseline)
