"""Compare the models of a multirun.

Jobs that differ by their seed alone are runs of one model. Every model, and every baseline, is compared with the first
model on the same test rows.

S seeds, N test rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from energy_flow.comparison.compare import ALONE, Comparison, Method
from energy_flow.comparison.jobs import Job, distinguishing_overrides
from energy_flow.errors import DataError
from energy_flow.metrics.row_scores import FILE, MODEL, RowScores, read_row_scores
from energy_flow.metrics.task import TASKS, Task

_ABLATION = "ablation="


@dataclass(frozen=True)
class _Group:
    """The jobs of one model, and the row scores of its tested jobs."""

    name: str
    jobs: tuple[Job, ...]
    tested: Mapping[str, RowScores]  # by the name of the job
    missing: tuple[str, ...]

    @property
    def source(self) -> tuple[str, str] | None:
        """Measure and test data of all runs; None if there are no runs, or if they differ."""
        found = {(scores.measure, scores.fingerprint) for scores in self.tested.values()}
        return found.pop() if len(found) == 1 else None

    def runs(self, method: str) -> list[Job]:
        """The jobs that tested a method."""
        return [job for job in self.jobs if job.name in self.tested and method in self.tested[job.name].values]

    def scores(self, method: str, task: Task) -> Tensor:
        """Primary scores [S, N] of a method, over the runs that have it."""
        return task.primary_scores(torch.stack([self.tested[job.name].values[method] for job in self.runs(method)]))


def compare_jobs(jobs: Sequence[Job]) -> Comparison | None:
    """Compare all jobs; None for a single job, and while no job has row scores."""
    groups = _groups(jobs)
    reference = next((group for group in groups if group.source is not None), None)
    if len(jobs) < 2 or reference is None or reference.source is None:
        return None
    measure, _ = reference.source
    task = next(task for task in TASKS if task.row_measure == measure)
    models = [_model(group, reference, task) for group in groups]
    baselines = [_baseline(name, reference, task) for name in task.baselines if reference.runs(name)]
    return Comparison(task, models + baselines)


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


def _model(group: _Group, reference: _Group, task: Task) -> Method:
    same_measure = all(scores.measure == task.row_measure for scores in group.tested.values())
    names = ["params", *(f"test/{metric}" for metric in task.secondary), "fit_seconds"]
    runs = group.runs(MODEL)
    primary = [task.primary_scores(scores.values[MODEL]).mean().item() for scores in group.tested.values()]
    return Method(
        key=group.jobs[0].name,  # a number, and so never the name of a baseline
        name=group.name,
        is_baseline=False,
        metrics={name.removeprefix("test/"): _mean(runs, name) for name in names},
        scores=group.scores(MODEL, task) if same_measure and group.source is not None else None,
        paired=group.source == reference.source,
        seeds=tuple(job.seed for job in runs),
        primary=tuple(primary) if same_measure else (),
        missing=group.missing,
        note=_why_not_paired(group, reference, same_measure),
    )


def _why_not_paired(group: _Group, reference: _Group, same_measure: bool) -> str:
    if group.source == reference.source:
        return ""
    if not group.tested:
        return "no job has row scores"
    if not same_measure:
        return "measured by another metric: not comparable"
    if group.source is None:
        return "test data differ between seeds: no interval, no difference"
    return "other test data: no difference"


def _baseline(name: str, reference: _Group, task: Task) -> Method:
    runs, scores = reference.runs(name), reference.scores(name, task)
    secondary = {metric: _mean(runs, f"baseline/{name}/{metric}") for metric in task.secondary}
    return Method(
        key=name,
        name=name,
        is_baseline=True,
        metrics={"params": None, **secondary, "fit_seconds": None},
        scores=scores,
        seeds=tuple(job.seed for job in runs),
        primary=tuple(scores.mean(1).tolist()),
    )


def _mean(runs: Sequence[Job], name: str) -> float | None:
    """The mean of a metric over all runs; None if a run lacks it."""
    found = [job.metrics.get(name) for job in runs]
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None
