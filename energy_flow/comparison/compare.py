"""Compare methods on the same test rows: bootstrap intervals and paired differences.

S runs of a method, N test rows
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.metrics.bootstrap import Bootstrap, Interval, mean_interval
from energy_flow.metrics.row_scores import MODEL  # also the key of a single model
from energy_flow.metrics.task import Task

ALONE = "flow lattice"  # name of a model that needs no name of its own
MEAN = "models"  # key of the mean of several models; `mean` is a baseline
Pair = tuple[str, str]  # keys of two methods: the first minus the second


@dataclass(frozen=True)
class Method:
    """A model or a baseline with its test results."""

    key: str  # unique in a comparison
    name: str  # for tables
    is_baseline: bool
    metrics: Mapping[str, float | None]  # by name, such as `mrr`; of several runs the mean. None: unknown
    scores: Tensor | None  # primary scores, float64 [S, N]; None: the runs share no complete set of test rows
    paired: bool = True  # whether it was measured on the same test rows as all other paired methods
    seeds: tuple[int | None, ...] = ()  # of the runs that were tested
    primary: tuple[float, ...] = ()  # the primary metric of each of these runs
    missing: tuple[str, ...] = ()  # jobs without results, by seed and number
    note: str = ""  # the reason why there is no difference


class Comparison:
    """Methods with bootstrap intervals of the primary metric: models first, then their mean if any, then baselines."""

    def __init__(self, task: Task, methods: Sequence[Method]) -> None:
        self.task = task
        self.methods = {method.key: method for method in methods}
        self.models = [method for method in methods if not method.is_baseline]
        self.baselines = [method for method in methods if method.is_baseline]
        self._paired = {method.key: method.scores for method in methods if method.paired and method.scores is not None}
        self._bootstrap = Bootstrap(self._paired) if self._paired else None

    @property
    def reference(self) -> Method:
        """The first paired model."""
        return next(method for method in self.models if method.paired)

    @property
    def num_rows(self) -> int | None:
        """N of the paired methods; None if there are none."""
        return next((scores.shape[1] for scores in self._paired.values()), None)

    def interval(self, key: str) -> Interval | None:
        """The primary metric of a method with its interval; None if it has no scores."""
        if self._bootstrap is not None and key in self._paired:
            return self._bootstrap.interval(key)
        scores = self.methods[key].scores
        return None if scores is None else mean_interval(scores)

    def difference(self, ours: str, theirs: str) -> Interval | None:
        """Primary metric of `ours` minus that of `theirs`, with its interval; None if they are not paired."""
        if self._bootstrap is None or not {ours, theirs} <= self._paired.keys():
            return None
        return self._bootstrap.difference(ours, theirs)


def mean_metrics(models: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of every metric that all models have."""
    means = {}
    for name in models[0]:
        values = [value for metrics in models if (value := metrics.get(name)) is not None]
        if len(values) == len(models):
            means[name] = sum(values) / len(values)
    return means


def mean_model(models: Sequence[Method]) -> Method:
    """The mean of several models; each of them is one of its runs."""
    scores = [model.scores for model in models if model.scores is not None]
    together = torch.cat(scores) if len(scores) == len(models) else None
    return Method(MEAN, f"mean of {len(models)}", False, mean_metrics([model.metrics for model in models]), together)


def pairs_of(comparison: Comparison) -> list[Pair]:
    """The pairs to compare.

    A single model is compared with every baseline. Several models, and their mean, are compared with the best
    baseline; all models but the first are also compared with the first.
    """
    models, baselines = ([method.key for method in group] for group in (comparison.models, comparison.baselines))
    if MEAN not in models:
        return [(ours, theirs) for ours in models for theirs in baselines]
    best = best_baseline(comparison)
    first, *others = (key for key in models if key != MEAN)
    return [*((ours, best) for ours in models if best is not None), *((ours, first) for ours in others)]


def best_baseline(comparison: Comparison) -> str | None:
    """The baseline with the best primary metric; None without baselines."""
    values = [method.metrics[comparison.task.primary] for method in comparison.baselines]
    known = [math.nan if value is None else value for value in values]
    return comparison.baselines[comparison.task.best(known)].key if known else None


def flat_metrics(comparison: Comparison, pairs: Sequence[Pair], suffix: str = "") -> dict[str, float]:
    """Metrics, intervals and differences of pairs by their keys in `metrics.json`: `test/mrr`, `test/mrr_low`, ...

    `suffix` ends the first part of every key, to distinguish several comparisons: `test_all/mrr`.
    """
    flat: dict[str, float] = {}
    primary = comparison.task.primary
    for key, method in comparison.methods.items():
        section = f"{'baseline' if method.is_baseline else 'model'}{suffix}/{key}"
        section = f"test{suffix}" if key in (MODEL, MEAN) else section
        flat |= {f"{section}/{name}": value for name, value in method.metrics.items() if value is not None}
        flat |= bounds(f"{section}/{primary}", comparison.interval(key))
    for ours, theirs in pairs:
        difference = comparison.difference(ours, theirs)
        if difference is not None:
            name = f"difference{suffix}/{ours}/{theirs}/{primary}"
            flat |= {name: difference.mean, **bounds(name, difference)}
    return flat


def bounds(name: str, interval: Interval | None) -> dict[str, float]:
    """The bounds of an interval by their names in result files, `mrr_low` and `mrr_high`; empty without an interval."""
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}
