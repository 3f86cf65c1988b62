"""Which of the models of a multirun are better, and how sure that is.

Jobs that differ by their seed alone are one model trained several times. Every model, and every baseline, is compared
with the first one on the same test rows. S seeds, N test rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from energy_flow.comparison.jobs import Job, distinguishing_overrides
from energy_flow.errors import DataError
from energy_flow.metrics.bootstrap import Bootstrap, Interval, mean_interval
from energy_flow.metrics.row_scores import FILE, MODEL, RowScores, read_row_scores
from energy_flow.metrics.task import TASKS, Task

ALONE = "flow lattice"  # the name of a model that nothing tells apart
_ABLATION = "ablation="


@dataclass(frozen=True)
class Method:
    """A line of the comparison.

    Attributes:
        name: the overrides that tell a model from the others, or the name of a baseline.
        is_baseline: whether it is one, of the first model's runs.
        seeds: of the runs that were tested, in their order.
        headlines: the task's headline on the test split, of each of these runs.
        mean: of the headlines, with its interval; None where there is nothing to draw it from.
        difference: to the first model, with its interval; None for the first model and where rows are no pair.
        metrics: means over the runs of params, the task's other summary metrics and fit_seconds; None: not known.
        missing: jobs without results, by seed and number.
        note: why there is no difference; else empty.
    """

    name: str
    is_baseline: bool
    seeds: tuple[int | None, ...]
    headlines: tuple[float, ...]
    mean: Interval | None
    difference: Interval | None
    metrics: Mapping[str, float | None]
    missing: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Comparison:
    """All methods of a multirun, the models in the order of their jobs, then the baselines."""

    task: Task
    reference: str  # the model that the others are compared with
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class _Group:
    """The jobs of one model, and the rows of those that were tested."""

    name: str
    jobs: tuple[Job, ...]
    tested: Mapping[str, RowScores]  # by the name of the job
    missing: tuple[str, ...]

    @property
    def key(self) -> str:
        """A number, which no baseline is called by."""
        return self.jobs[0].name

    @property
    def source(self) -> tuple[str, str] | None:
        """What was measured on which data; None where runs differ in it, or there is none."""
        found = {(rows.measure, rows.fingerprint) for rows in self.tested.values()}
        return found.pop() if len(found) == 1 else None

    @property
    def runs(self) -> tuple[Job, ...]:
        """The jobs that were tested."""
        return tuple(job for job in self.jobs if job.name in self.tested)

    def values(self, method: str, task: Task) -> Tensor:
        """The headline of every row, [S, N], over the runs that have the method."""
        found = [rows.values[method] for rows in self.tested.values() if method in rows.values]
        return task.primary_of_rows(torch.stack(found))


def compare(jobs: Sequence[Job]) -> Comparison | None:
    """The comparison of all jobs; None for a single job, or as long as no job has test rows."""
    groups = _groups(jobs)
    reference = next((group for group in groups if group.source is not None), None)
    if len(jobs) < 2 or reference is None or reference.source is None:
        return None
    task = next(task for task in TASKS if task.row_measure == reference.source[0])
    paired = [group for group in groups if group.source == reference.source]
    baselines = [name for name in task.baselines if any(name in rows.values for rows in reference.tested.values())]
    values = {group.key: group.values(MODEL, task) for group in paired}
    values |= {name: reference.values(name, task) for name in baselines}
    draws = Bootstrap(values)
    methods = [_model(group, reference, task, draws) for group in groups]
    methods += [_baseline(name, reference, task, draws) for name in baselines]
    return Comparison(task, reference.name, tuple(methods))


def _groups(jobs: Sequence[Job]) -> list[_Group]:
    by_variant: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        by_variant.setdefault(job.variant, []).append(job)
    names = [name or ALONE for name in distinguishing_overrides(list(by_variant))]
    if all(name.startswith(_ABLATION) for name in names):
        names = [name.removeprefix(_ABLATION) for name in names]
    return [_group(name, own) for name, own in zip(names, by_variant.values(), strict=True)]


def _group(name: str, jobs: Sequence[Job]) -> _Group:
    tested: dict[str, RowScores] = {}
    missing = []
    for job in jobs:
        try:
            tested[job.name] = read_row_scores(job.folder / FILE)
        except DataError as error:
            reason = f", {error}" if (job.folder / FILE).exists() else ""
            missing.append(f"seed {job.seed} (job {job.name}{reason})")
    return _Group(name, tuple(jobs), tested, tuple(missing))


def _model(group: _Group, reference: _Group, task: Task, draws: Bootstrap) -> Method:
    paired = group.source == reference.source
    same_measure = all(rows.measure == task.row_measure for rows in group.tested.values())
    headlines = tuple(
        task.primary_of_rows(rows.values[MODEL]).mean().item() for rows in group.tested.values() if same_measure
    )
    mean = None
    if same_measure and group.source is not None:
        mean = draws.interval(group.key) if paired else mean_interval(group.values(MODEL, task))
    names = ["params", *(f"test/{metric}" for metric in task.summary if metric != task.headline), "fit_seconds"]
    return Method(
        name=group.name,
        is_baseline=False,
        seeds=tuple(job.seed for job in group.runs),
        headlines=headlines,
        mean=mean,
        difference=draws.difference(group.key, reference.key) if paired and group is not reference else None,
        metrics={name.removeprefix("test/"): _mean(group.runs, name) for name in names},
        missing=group.missing,
        note="" if paired else _why_no_pair(group, same_measure),
    )


def _why_no_pair(group: _Group, same_measure: bool) -> str:
    if not group.tested:
        return "no job has test rows"
    if not same_measure:
        return "measured by something else: can't be compared"
    if group.source is None:
        return "test data differ from seed to seed: no pair, no interval"
    return "other test data: no pair"


def _baseline(name: str, reference: _Group, task: Task, draws: Bootstrap) -> Method:
    runs = [job for job in reference.runs if name in reference.tested[job.name].values]
    others = [metric for metric in task.summary if metric != task.headline]
    return Method(
        name=name,
        is_baseline=True,
        seeds=tuple(job.seed for job in runs),
        headlines=tuple(reference.values(name, task).mean(1).tolist()),
        mean=draws.interval(name),
        difference=draws.difference(name, reference.key),
        metrics={
            "params": None,
            **{metric: _mean(runs, f"baseline/{name}/{metric}") for metric in others},
            "fit_seconds": None,
        },
        missing=(),
        note="",
    )


def _mean(runs: Sequence[Job], name: str) -> float | None:
    found = [job.metrics.get(name) for job in runs]
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None
