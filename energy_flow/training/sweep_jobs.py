"""The jobs of a Hydra multirun, read back from its folder."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    """

    name: str
    folder: Path
    words: tuple[str, ...]
    seed: int | None
    metrics: dict[str, float | None]

    @property
    def variant(self) -> tuple[str, ...]:
        """Its overrides but for the seed: jobs that share them are one model trained several times."""
        return tuple(word for word in self.words if not _SEED.match(word))


def read_jobs(folder: Path) -> list[Job]:
    """All jobs that have begun, by number."""
    return [_read(path) for path in sorted(folder.glob("**/.hydra/overrides.yaml"), key=_job_number)]


def told_apart(given: Sequence[Sequence[str]]) -> list[str]:
    """Of each list of overrides those that not all of them have, as one would type them."""
    common = set.intersection(*map(set, given)) if len(given) > 1 else set()
    return [shlex.join(word for word in words if word not in common) for words in given]


def _job_number(overrides: Path) -> tuple[int, str]:
    name = overrides.parent.parent.name
    return (int(name) if name.isdigit() else -1, str(overrides))


def _read(overrides: Path) -> Job:
    run = overrides.parent.parent
    metrics = run / "metrics.json"
    config = _plain(overrides.with_name("config.yaml"))
    seed = config.get("seed") if isinstance(config, dict) else None
    return Job(
        name=run.name,
        folder=run,
        words=tuple(map(str, _plain(overrides) or ())),
        seed=seed if isinstance(seed, int) else None,
        metrics=json.loads(metrics.read_text()) if metrics.is_file() else {},
    )


def _plain(path: Path) -> Any:
    """A file of a run folder as it stands: references such as ${oc.env:HOME} stay text."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
