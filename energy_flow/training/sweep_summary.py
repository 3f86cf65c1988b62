"""A table over the jobs of a Hydra multirun."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from energy_flow.training.task import TASKS


class SweepSummary(Callback):
    """Writes `summary.csv` (every metric) and `summary.md` into the multirun folder, and prints the table.

    The files are written after every job: an interrupted sweep, or one with a job that failed, has them too.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            _summarise(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs, columns = _summarise(folder)
        table = Table(title=f"Summary of {len(jobs)} jobs: {folder}", title_justify="left")
        for name in ("job", "overrides", *columns):
            table.add_column(name, justify="left" if name in ("job", "overrides") else "right")
        for job in jobs:
            table.add_row(job["job"], job["overrides"], *(_number(job.get(name)) for name in columns))
        Console().print(table)


def _summarise(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Write both files; returns the jobs and the columns that are shown of them."""
    jobs = [_read(path) for path in sorted(folder.glob("**/.hydra/overrides.yaml"), key=_job_number)]
    columns = [name for name in _shown(jobs) if any(name in job for job in jobs)]
    _write_csv(folder / "summary.csv", jobs)
    jobs = _without_common_overrides(jobs)
    _write_markdown(folder / "summary.md", jobs, columns)
    return jobs, columns


def _shown(jobs: list[dict[str, Any]]) -> list[str]:
    """The columns of the tasks that jobs were measured by: those whose `optimized_metric` they have."""
    tasks = [task for task in TASKS if any(name in job for name in task.optimized for job in jobs)]
    headlines = [f"val/{task.headline}" for task in tasks]
    return [*headlines, *(f"test/{metric}" for task in tasks for metric in task.summary), "fit_seconds"]


def _job_number(overrides: Path) -> tuple[int, str]:
    name = overrides.parent.parent.name
    return (int(name) if name.isdigit() else -1, str(overrides))


def _read(overrides: Path) -> dict[str, Any]:
    run = overrides.parent.parent
    job = {"job": run.name, "overrides": shlex.join(OmegaConf.load(overrides))}
    metrics = run / "metrics.json"
    return {**job, **(json.loads(metrics.read_text()) if metrics.is_file() else {})}


def _without_common_overrides(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In a table only what tells the jobs apart has room."""
    given = [shlex.split(job["overrides"]) for job in jobs]
    common = set.intersection(*map(set, given)) if len(jobs) > 1 else set()
    left = [shlex.join(word for word in words if word not in common) for words in given]
    return [{**job, "overrides": words} for job, words in zip(jobs, left, strict=True)]


def _write_csv(path: Path, jobs: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for job in jobs for name in job))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(jobs)


def _write_markdown(path: Path, jobs: list[dict[str, Any]], columns: list[str]) -> None:
    names = ["job", "overrides", *columns]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for job in jobs:
        cells = [job["job"], job["overrides"], *(_number(job.get(name)) for name in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
