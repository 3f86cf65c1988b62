"""Models beside baselines on the same test rows: how far apart they are, and how sure that is.

S models, N test rows
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from energy_flow.metrics.bootstrap import LEVEL, Bootstrap, Interval
from energy_flow.metrics.row_scores import MODEL  # also the key of the only model
from energy_flow.metrics.task import Task

MEAN = "models"  # key of the mean of several; `mean` is a baseline
Pair = tuple[str, str]  # one method less another


@dataclass(frozen=True)
class Method:
    """What a method reached.

    Attributes:
        metrics: by name, such as `mrr`.
        shares: float64 [S, N], the numbers whose mean is the headline: of one model or several; None: the test was
            limited to some of its rows, which can't be compared with those of others.
    """

    metrics: dict[str, float]
    shares: Tensor | None

    @classmethod
    def mean(cls, methods: list["Method"]) -> "Method":
        """The mean of several."""
        names = [name for name in methods[0].metrics if all(name in method.metrics for method in methods)]
        metrics = {name: sum(method.metrics[name] for method in methods) / len(methods) for name in names}
        shares = [method.shares for method in methods if method.shares is not None]
        return cls(metrics, torch.cat(shares) if len(shares) == len(methods) else None)


class SideBySide:
    """Methods by key, measured on the same test rows among the same candidates.

    Args:
        task: what they are measured by.
        models: one, or several: then their mean stands beside them as `MEAN`.
        baselines: what they are compared with.
        suffix: of the keys in `metrics.json`, which tells comparisons apart.

    Attributes:
        methods: all of them, the mean included.
        intervals: of the headline by method; empty where the test was limited to some of its rows.
    """

    def __init__(
        self, task: Task, models: Mapping[str, Method], baselines: Mapping[str, Method], suffix: str = ""
    ) -> None:
        self.task, self.models, self.baselines, self.suffix = task, dict(models), dict(baselines), suffix
        if len(models) > 1:
            self.models[MEAN] = Method.mean(list(models.values()))
        self.methods = {**self.models, **self.baselines}
        shares = {key: method.shares for key, method in self.methods.items() if method.shares is not None}
        self._draws = Bootstrap(shares) if len(shares) == len(self.methods) else None
        self.intervals = {key: self._draws.interval(key) for key in shares} if self._draws else {}

    @property
    def several(self) -> bool:
        """Whether there is more than one model."""
        return MEAN in self.models

    @property
    def best_baseline(self) -> str | None:
        """The best one by the headline; None where there is none."""
        best: str | None = None
        found = {key: method.metrics[self.task.headline] for key, method in self.baselines.items()}
        for key, value in found.items():
            best = key if best is None or self.task.improves(value, found[best]) else best
        return best

    def pairs(self) -> list[Pair]:
        """What is compared: the only model with each baseline, or several with the best of them and with the first."""
        if not self.several:
            return [(ours, theirs) for ours in self.models for theirs in self.baselines]
        first, *others = (key for key in self.models if key != MEAN)
        best = self.best_baseline
        return [*((ours, best) for ours in self.models if best is not None), *((ours, first) for ours in others)]

    def differences(self, pairs: list[Pair]) -> dict[Pair, Interval]:
        """Of the headline; empty where there are no intervals."""
        return {pair: self._draws.difference(*pair) for pair in pairs} if self._draws else {}

    def flat(self, pairs: list[Pair]) -> dict[str, float]:
        """Metrics, intervals and differences by their keys in `metrics.json`: `test/mrr`, `test/mrr_low`, ..."""
        flat: dict[str, float] = {}
        headline = self.task.headline
        for key, method in self.methods.items():
            section = self._section(key)
            flat |= {f"{section}/{name}": value for name, value in method.metrics.items()}
            if key in self.intervals:
                flat |= _bounds(f"{section}/{headline}", self.intervals[key])
        for (ours, theirs), found in self.differences(pairs).items():
            name = f"difference{self.suffix}/{ours}/{theirs}/{headline}"
            flat |= {name: found.mean, **_bounds(name, found)}
        return flat

    def _section(self, key: str) -> str:
        if key in (MODEL, MEAN):
            return f"test{self.suffix}"
        return f"{'baseline' if key in self.baselines else 'model'}{self.suffix}/{key}"


def short_names(paths: list[Path], taken: set[str]) -> list[str]:
    """What tells files apart: no more of their folders than that needs, no file name that all of them have.

    Args:
        paths: different ones, absolute. One whose folders can't tell it apart is called by its number.
        taken: names that stand for something else.
    """
    full = [(*path.parent.parts, path.name) for path in paths]
    short = [(*(part for part in path.parent.parts if part != "checkpoints"), path.stem) for path in paths]
    parts = short if len(set(short)) == len(paths) else full
    if len(parts) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    endings = [["-".join(own[-length:]) for length in range(1, len(own))] for own in parts]
    counts = Counter(name for names in endings for name in names)
    return [
        next((name for name in names if counts[name] == 1 and name not in taken), str(number))
        for number, names in enumerate(endings, 1)
    ]


def show_how_sure(comparisons: Mapping[str, SideBySide], labels: Mapping[str, str], console: Console) -> None:
    """The table of intervals: of every method's headline, and of the differences that count.

    Args:
        comparisons: of the same methods, by the heading of their headline; the first one decides which are compared.
        labels: of methods, where they aren't their keys.
    """
    main = next(iter(comparisons.values()))
    shares = next(iter(main.models.values())).shares
    if shares is None:
        return
    pairs = main.pairs()
    over = f"{shares.shape[1]:,} test rows" + (", of the mean also over models" if main.several else "")
    table = Table(title=f"How sure: {LEVEL:.0%} bootstrap intervals over {over}", title_justify="left")
    table.add_column("method", overflow="fold")
    for heading in comparisons:
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("interval", justify="right", no_wrap=True)
    for key in main.methods:
        cells = (_cells(comparison.task, comparison.intervals[key], "") for comparison in comparisons.values())
        table.add_row(Text(labels.get(key, key)), *(cell for found in cells for cell in found))
    differences = [comparison.differences(pairs) for comparison in comparisons.values()]
    side, other = (1, 0) if main.several else (0, 1)  # what all pairs of a section share, and what they don't
    section = None
    for pair in pairs:
        if pair[side] != section:
            section = pair[side]
            table.add_section()
            table.add_row(Text(_section_title(main, labels.get(section, section), section)), style="italic")
        cells = (_cells(main.task, found[pair], "+") for found in differences)
        table.add_row(Text(f"  {labels.get(pair[other], pair[other])}"), *(cell for found in cells for cell in found))
    console.print(table)


def _section_title(comparison: SideBySide, label: str, key: str) -> str:
    if not comparison.several:
        return f"{label} minus"
    return f"minus {label}, the {'best baseline' if key in comparison.baselines else 'first'}"


def _cells(task: Task, interval: Interval, sign: str) -> tuple[str, str]:
    def shown(value: float) -> str:
        return (sign if value >= 0 else "") + task.shown(task.headline, value)

    return shown(interval.mean), f"{shown(interval.low)} to {shown(interval.high)}"


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}
