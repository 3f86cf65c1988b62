"""Read the jobs of a Hydra multirun from its folder."""

import functools
import json
import re
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from energy_flow.errors import EnergyFlowError

_ERROR = "error.txt"
_SEED = re.compile(r"\+{0,2}seed=")


@dataclass(frozen=True)
class Job:
    """One job of a multirun."""

    name: str  # of its folder: the job's number
    folder: Path
    words: tuple[str, ...]  # its overrides
    seed: int | None  # None if the config has none
    metrics: dict[str, float | None]  # of `metrics.json`, None for a number that was not finite; empty without the file
    error: str | None = None  # one line about the error that ended the job; None without an error, or after a kill

    @property
    def variant(self) -> tuple[str, ...]:
        """All overrides except the seed: jobs with equal ones are runs of one model."""
        return tuple(word for word in self.words if not _SEED.match(word))


def read_jobs(folder: Path) -> list[Job]:
    """All jobs that have started, in order of their numbers."""
    return [_read(path) for path in sorted(folder.glob("**/.hydra/overrides.yaml"), key=_job_number)]


def write_error(folder: Path, error: BaseException) -> None:
    """Write an error into the folder of its job: a one-line summary, then the traceback."""
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    line = message if isinstance(error, EnergyFlowError | KeyboardInterrupt) else f"{type(error).__name__}: {message}"
    (folder / _ERROR).write_text("\n".join([line, "", *traceback.format_exception(error)]))


def clear_error(folder: Path) -> None:
    """Remove the error of an earlier run in this folder."""
    (folder / _ERROR).unlink(missing_ok=True)


def distinguishing_overrides(given: Sequence[Sequence[str]]) -> list[str]:
    """For each list, the overrides that not all lists share, written as a command line."""
    common = set.intersection(*map(set, given)) if len(given) > 1 else set()
    return [shlex.join(word for word in words if word not in common) for words in given]


def _job_number(overrides: Path) -> tuple[int, str]:
    name = overrides.parent.parent.name
    return (int(name) if name.isdigit() else -1, str(overrides))


def _read(overrides: Path) -> Job:
    run = overrides.parent.parent
    metrics, error = run / "metrics.json", run / _ERROR
    words, seed = _read_overrides(overrides, overrides.stat().st_mtime_ns)
    return Job(
        name=run.name,
        folder=run,
        words=words,
        seed=seed,
        metrics=json.loads(metrics.read_text()) if metrics.is_file() else {},
        error=error.read_text().partition("\n")[0] if error.is_file() else None,
    )


@functools.cache
def _read_overrides(overrides: Path, written: int) -> tuple[tuple[str, ...], int | None]:
    """Overrides and seed of a job. Cached by modification time: YAML is slow, and every job's end reads all jobs."""
    # Not by OmegaConf: ${oc.env:HOME} stays text.
    config, words = (yaml.safe_load(path.read_bytes()) for path in (overrides.with_name("config.yaml"), overrides))
    seed = config.get("seed") if isinstance(config, dict) else None
    return tuple(map(str, words or ())), seed if isinstance(seed, int) else None
