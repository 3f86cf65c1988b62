"""Compare methods on the same test rows: bootstrap intervals and paired differences.

S runs of a method, N test rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from energy_flow.metrics.bootstrap import Bootstrap, Interval, mean_interval
from energy_flow.metrics.task import Task

ALONE = "flow lattice"  # name of a model that needs no name of its own


@dataclass(frozen=True)
class Method:
    """A model or a baseline with its test results.

    Attributes:
        key: unique in a comparison.
        name: for tables.
        is_baseline: whether it is a baseline.
        metrics: by name, such as `mrr`; of several runs the mean. None: unknown.
        scores: primary scores of the task, float64 [S, N]; None: the runs share no complete set of test rows.
        paired: whether all paired methods were measured on the same test rows.
        seeds: of the runs that were tested.
        primary: the primary metric of each of these runs.
        missing: jobs without results, by seed and number.
        note: the reason why there is no difference; empty if there is one.
    """

    key: str
    name: str
    is_baseline: bool
    metrics: Mapping[str, float | None]
    scores: Tensor | None
    paired: bool = True
    seeds: tuple[int | None, ...] = ()
    primary: tuple[float, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""


class Comparison:
    """Methods with bootstrap intervals of the primary metric.

    Args:
        task: how the methods were measured.
        methods: models first, then baselines. The first paired model is the reference.
    """

    def __init__(self, task: Task, methods: Sequence[Method]) -> None:
        self.task = task
        self.methods = {method.key: method for method in methods}
        self._paired = {method.key: method.scores for method in methods if method.paired and method.scores is not None}
        self._bootstrap = Bootstrap(self._paired) if self._paired else None

    @property
    def models(self) -> list[Method]:
        """All methods that are no baselines."""
        return [method for method in self.methods.values() if not method.is_baseline]

    @property
    def baselines(self) -> list[Method]:
        """All baselines."""
        return [method for method in self.methods.values() if method.is_baseline]

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


def bounds(name: str, interval: Interval | None) -> dict[str, float]:
    """The bounds of an interval by their names in result files, `mrr_low` and `mrr_high`; empty without an interval."""
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}
