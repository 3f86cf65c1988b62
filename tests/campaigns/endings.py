"""Runs that are ended early; resumed, they must end like a run that was never stopped."""

import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from energy_flow.checkpoints.format import corruption
from tests.cli.helpers import spawn, start
from tests.cli.same import unlike
from tests.cli.test_resume import BUSY

RUN = (
    *BUSY,
    "trainer.max_epochs=30",
    "callbacks.early_stopping=null",
    "callbacks.last_checkpoint.every_seconds=0.01",
    "logger=[tensorboard,csv]",
    "trainer.log_every_n_steps=1",
)
WAIT = 120.0  # seconds until a run must have begun to train


@dataclass
class Findings:
    """The results of a campaign."""

    runs: int = 0
    events: Counter[str] = field(default_factory=Counter)  # event and stage of the run -> count
    unreadable: list[str] = field(default_factory=list)  # last.ckpt that existed and were corrupt
    failed: list[str] = field(default_factory=list)  # runs that ended wrongly, or didn't resume
    unlike: list[str] = field(default_factory=list)  # differences to the uninterrupted run

    def report(self) -> str:
        events = ", ".join(f"{count} in {stage}" for stage, count in self.events.most_common())
        lines = [
            f"{self.runs} runs, {self.events.total()} times ended: {events}",
            f"unreadable last.ckpt: {len(self.unreadable)}",
            f"runs that ended wrongly or did not resume: {len(self.failed)}",
            f"differences to the uninterrupted run: {len(self.unlike)}",
        ]
        return "\n".join([*lines, *self.unreadable, *self.failed, *self.unlike])

    @property
    def clean(self) -> bool:
        return not (self.unreadable or self.unlike or self.failed)

    def look_at_checkpoints(self, place: Path) -> None:
        for last in place.glob("train/runs/*/checkpoints/last.ckpt"):
            reason = corruption(last)
            if reason is not None:
                self.unreadable.append(f"{last}: {reason}")


def overrides(place: Path) -> tuple[str, ...]:
    """The overrides of a run in `place` that resumes when it is started again."""
    where = (f"+callbacks.where.file={place}.stage", "+callbacks.where._target_=tests.campaigns.where.Where")
    return (*RUN, *where, f"paths.log_dir={place}", "resume=auto")


def begin(folder: Path, place: Path, prefix: Sequence[str] = ()) -> tuple[subprocess.Popen, Path]:
    """Start a run and wait until it trains, or has ended; returns the process and the file with its stage."""
    stage = Path(f"{place}.stage")
    stage.unlink(missing_ok=True)
    process = start("train", folder, *overrides(place), prefix=prefix)
    end = time.monotonic() + WAIT
    while process.poll() is None and not stage.is_file() and time.monotonic() < end:
        time.sleep(0.005)
    return process, stage


def is_finished(place: Path) -> bool:
    return bool(list(place.glob("train/runs/*/finished")))


def finish_and_compare(folder: Path, place: Path, through: Path, findings: Findings) -> None:
    """Resume a run until it is finished, and compare it with the folder of a run that was never stopped."""
    findings.runs += 1
    if not is_finished(place):
        ended = spawn("train", folder, *overrides(place))
        if ended.code != 0:
            findings.failed.append(f"{place.name}: exit code {ended.code}: {ended.err[-3000:]}")
            return
    begun = {path.parent.parent for path in place.glob("train/runs/*/checkpoints/*.ckpt")}
    if len(begun) != 1:  # a run without a checkpoint starts anew
        findings.failed.append(f"{place.name}: {len(begun)} runs with checkpoints, expected 1")
        return
    findings.unlike += [f"{place.name}: {what}" for what in unlike(through, begun.pop())]


def seconds_of(run: Path) -> float:
    """Seconds from the start of a run to its results, by the times of its files."""
    return (run / "metrics.json").stat().st_mtime - (run / ".hydra" / "config.yaml").stat().st_mtime
