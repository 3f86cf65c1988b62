"""Tables over the jobs of a Hydra multirun."""

import csv
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from energy_flow.comparison.compare import compare
from energy_flow.comparison.jobs import Job, distinguishing_overrides, read_jobs
from energy_flow.comparison.report import comparison_table, write_comparison
from energy_flow.metrics.task import TASKS

_WORDS = ("job", "overrides", "error")


class SweepSummary(Callback):
    """Writes `summary.csv` (every metric) and `summary.md` into the multirun folder, and prints the table.

    Beside them stands the comparison of the models, where there is more than one job: `comparison.csv`, `.md` and
    `.png`. All are written after every job: an interrupted sweep, or one with a job that failed, has them too. A sweep
    with a job that did not finish ends with exit code 1.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            # Hydra keeps what a job returned until the sweep ends, with copies of its whole config.
            job_return.cfg = job_return.hydra_cfg = None
            folder = Path(config.hydra.sweep.dir)
            jobs = read_jobs(folder)
            _summarise(folder, jobs)
            comparison = compare(jobs)
            if comparison is not None:
                write_comparison(folder, comparison)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        columns = _summarise(folder, jobs)
        table = Table(title=f"Summary of {len(jobs)} jobs: {folder}", title_justify="left")
        for name in columns:
            table.add_column(name, justify="left" if name in _WORDS else "right", overflow="fold")
        for cells in _cells(jobs, columns):
            table.add_row(*map(escape, cells))
        console = Console()
        console.print(table)
        comparison = compare(jobs)
        if comparison is not None:
            write_comparison(folder, comparison)
            console.print(comparison_table(comparison))
            console.print(f"comparison: {folder / 'comparison.png'}", highlight=False, soft_wrap=True)
        failed = [job.name for job in jobs if job.error is not None]
        if failed:
            print(f"{len(failed)} of {len(jobs)} jobs did not finish: {', '.join(failed)}", file=sys.stderr)
            sys.exit(1)


def _summarise(folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Write both files; returns the columns that are shown."""
    columns = ["job", "overrides", *(name for name in _shown(jobs) if any(name in job.metrics for job in jobs))]
    if any(job.error is not None for job in jobs):
        columns.append("error")
    _write_csv(folder / "summary.csv", jobs)
    _write_markdown(folder / "summary.md", jobs, columns)
    return columns


def _shown(jobs: Sequence[Job]) -> list[str]:
    """The columns of the tasks that jobs were measured by: those whose `optimized_metric` they have."""
    tasks = [task for task in TASKS if any(name in job.metrics for name in task.optimized for job in jobs)]
    headlines = [f"val/{task.headline}" for task in tasks]
    return [*headlines, *(f"test/{metric}" for task in tasks for metric in task.summary), "fit_seconds"]


def _write_csv(path: Path, jobs: Sequence[Job]) -> None:
    lines = [{"job": job.name, "overrides": shlex.join(job.words), **job.metrics, "error": job.error} for job in jobs]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def _write_markdown(path: Path, jobs: Sequence[Job], columns: Sequence[str]) -> None:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(jobs, columns)]
    path.write_text("\n".join(lines) + "\n")


def _cells(jobs: Sequence[Job], columns: Sequence[str]) -> Iterator[list[str]]:
    """The lines of a table."""
    for job, words in zip(jobs, distinguishing_overrides([job.words for job in jobs]), strict=True):
        texts = {"job": job.name, "overrides": words, "error": job.error or ""}
        yield [texts[name] if name in _WORDS else _number(job.metrics.get(name)) for name in columns]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
