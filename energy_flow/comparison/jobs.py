"""The jobs of a Hydra multirun, read back from its folder."""

import functools
import json
import re
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from energy_flow.errors import EnergyFlowError

_ERROR = "error.txt"
_SEED = re.compile(r"\+{0,2}seed=")


@dataclass(frozen=True)
class Job:
    """One job of a multirun.

    Attributes:
        name: of its folder, the job's number.
        folder: its run folder.
        words: its overrides.
        seed: of its config; None where that says none.
        metrics: what `metrics.json` holds, None for a number that was not finite; empty where there is no such file.
        error: what ended it, in a line; None where nothing did, or nobody could say.
    """

    name: str
    folder: Path
    words: tuple[str, ...]
    seed: int | None
    metrics: dict[str, float | None]
    error: str | None = None

    @property
    def variant(self) -> tuple[str, ...]:
        """Its overrides but for the seed: jobs that share them are one model trained several times."""
        return tuple(word for word in self.words if not _SEED.match(word))


def read_jobs(folder: Path) -> list[Job]:
    """All jobs that have begun, by number."""
    return [_read(path) for path in sorted(folder.glob("**/.hydra/overrides.yaml"), key=_job_number)]


def write_error(folder: Path, error: BaseException) -> None:
    """Keep what ended a job in its folder: a line that names it, then the traceback."""
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    line = message if isinstance(error, EnergyFlowError | KeyboardInterrupt) else f"{type(error).__name__}: {message}"
    (folder / _ERROR).write_text("\n".join([line, "", *traceback.format_exception(error)]))


def clear_error(folder: Path) -> None:
    """Forget what ended an earlier run in this folder."""
    (folder / _ERROR).unlink(missing_ok=True)


def distinguishing_overrides(given: Sequence[Sequence[str]]) -> list[str]:
    """Of each list of overrides those that not all of them have, as one would type them."""
    common = set.intersection(*map(set, given)) if len(given) > 1 else set()
    return [shlex.join(word for word in words if word not in common) for words in given]


def _job_number(overrides: Path) -> tuple[int, str]:
    name = overrides.parent.parent.name
    return (int(name) if name.isdigit() else -1, str(overrides))


def _read(overrides: Path) -> Job:
    run = overrides.parent.parent
    metrics, error = run / "metrics.json", run / _ERROR
    words, seed = _described(overrides, overrides.stat().st_mtime_ns)
    return Job(
        name=run.name,
        folder=run,
        words=words,
        seed=seed,
        metrics=json.loads(metrics.read_text()) if metrics.is_file() else {},
        error=error.read_text().partition("\n")[0] if error.is_file() else None,
    )


@functools.cache
def _described(overrides: Path, written: int) -> tuple[tuple[str, ...], int | None]:
    """Overrides and seed of a job; reading YAML is slow, and all jobs are read after each."""
    config = _plain(overrides.with_name("config.yaml"))
    seed = config.get("seed") if isinstance(config, dict) else None
    return tuple(map(str, _plain(overrides) or ())), seed if isinstance(seed, int) else None


def _plain(path: Path) -> Any:
    """A file of a run folder as it stands: references such as ${oc.env:HOME} stay text."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
