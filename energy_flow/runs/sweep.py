"""Summarise and compare the jobs of a Hydra multirun."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from energy_flow.atomic import atomic_write
from energy_flow.comparison.jobs import Job, distinguishing_overrides, read_jobs
from energy_flow.comparison.multirun import compare_jobs
from energy_flow.metrics.task import TASKS, is_known
from energy_flow.tables import markdown_table, print_text, rich_table, write_csv

_TEXT = ("job", "overrides", "error")


class SweepSummary(Callback):
    """Write `summary.csv` (all metrics) and `summary.md` into the multirun folder; print the table at the end.

    With more than one job, also write the comparison of the models: `comparison.csv`, `.md` and `.png`. All files are
    written after every job, so that an interrupted sweep, or one with a failed job, has them too. A sweep with a job
    that did not finish ends with exit code 1.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            # Hydra keeps every job's return value, with copies of its whole config, until the sweep ends.
            job_return.cfg = job_return.hydra_cfg = None
            folder = Path(config.hydra.sweep.dir)
            jobs = read_jobs(folder)
            _write_summary(folder, jobs)
            _compare(folder, jobs)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        _write_summary(folder, jobs)
        console, columns = Console(), _columns(jobs)
        title = f"Summary of {len(jobs)} jobs: {folder}"
        console.print(rich_table(columns, _cells(jobs, columns), title=title, left=_TEXT, wrap=columns))
        compared = _compare(folder, jobs)
        if compared is not None:
            console.print(compared)
            print_text(console, f"comparison: {folder / 'comparison.png'}")
        failed = [job.name for job in jobs if job.error is not None]
        if failed:
            print(f"{len(failed)} of {len(jobs)} jobs did not finish: {', '.join(failed)}", file=sys.stderr)
            sys.exit(1)


def _write_summary(folder: Path, jobs: Sequence[Job]) -> None:
    rows = [{"job": job.name, "overrides": shlex.join(job.words), **job.metrics, "error": job.error} for job in jobs]
    write_csv(folder / "summary.csv", rows)
    columns = _columns(jobs)
    atomic_write(folder / "summary.md", markdown_table(columns, _cells(jobs, columns)) + "\n")


def _compare(folder: Path, jobs: Sequence[Job]) -> Table | None:
    """Write the comparison of all jobs; returns it as a table, None if there is nothing to compare."""
    comparison = compare_jobs(jobs)
    if comparison is None:
        return None
    from energy_flow.comparison.report import comparison_table, write_comparison  # slow: imports matplotlib

    write_comparison(folder, comparison)
    return comparison_table(comparison)


def _columns(jobs: Sequence[Job]) -> list[str]:
    """The columns of the table: the summary metrics of all tasks that the jobs optimised, and metrics of their own."""
    tasks = [task for task in TASKS if any(name in job.metrics for name in task.optimized for job in jobs)]
    tested = [f"test/{metric}" for task in tasks for metric in task.summary]
    own = {name: None for job in jobs for name in job.metrics if name.startswith("val/") and not is_known(name)}
    names = [*(f"val/{task.primary}" for task in tasks), *own, *tested, "fit_seconds"]
    known = [name for name in names if any(name in job.metrics for job in jobs)]
    return ["job", "overrides", *known, *["error"] * any(job.error is not None for job in jobs)]


def _cells(jobs: Sequence[Job], columns: Sequence[str]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for job, words in zip(jobs, distinguishing_overrides([job.words for job in jobs]), strict=True):
        texts = {"job": job.name, "overrides": words, "error": job.error or ""}
        rows.append([texts[name] if name in texts else _number(job.metrics.get(name)) for name in columns])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
