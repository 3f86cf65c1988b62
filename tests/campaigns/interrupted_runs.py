"""Interrupt runs and resume them. At the end they must equal the uninterrupted run."""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
START_SECONDS = 120.0  # within which a run must begin to train


@dataclass
class Findings:
    """Results of a campaign."""

    runs: int = 0
    events: Counter[str] = field(default_factory=Counter)  # interruptions, by the stage of the run
    unreadable: list[str] = field(default_factory=list)  # last.ckpt files that are not whole
    failed: list[str] = field(default_factory=list)  # runs that ended wrongly or did not resume
    differences: list[str] = field(default_factory=list)  # to the uninterrupted run

    def report(self) -> str:
        """Return the counts, then every fault on a line."""
        events = ", ".join(f"{count} in {stage}" for stage, count in self.events.most_common())
        lines = [
            f"{self.runs} runs, {self.events.total()} interruptions: {events}",
            f"unreadable last.ckpt: {len(self.unreadable)}",
            f"runs that ended wrongly or did not resume: {len(self.failed)}",
            f"differences to the uninterrupted run: {len(self.differences)}",
        ]
        return "\n".join([*lines, *self.unreadable, *self.failed, *self.differences])

    @property
    def clean(self) -> bool:
        """Whether there is no fault."""
        return not (self.unreadable or self.differences or self.failed)

    def check_checkpoints(self, place: Path) -> None:
        """Read every last.ckpt below `place`."""
        for last in place.glob("train/runs/*/checkpoints/last.ckpt"):
            reason = corruption(last)
            if reason is not None:
                self.unreadable.append(f"{last}: {reason}")


def overrides(place: Path) -> tuple[str, ...]:
    """Return the overrides of a run below `place`; the same command starts and resumes it."""
    stage = (f"+callbacks.stage.file={place}.stage", "+callbacks.stage._target_=tests.campaigns.stage_file.StageFile")
    return (*RUN, *stage, f"paths.log_dir={place}", "resume=auto")


def begin(folder: Path, place: Path, prefix: Sequence[str] = ()) -> tuple[subprocess.Popen, Path]:
    """Start a run and wait until it trains or has ended; return it and the file that shows its stage."""
    stage = Path(f"{place}.stage")
    stage.unlink(missing_ok=True)
    process = start("train", folder, *overrides(place), prefix=prefix)
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and not stage.is_file() and time.monotonic() < end:
        time.sleep(0.005)
    return process, stage


def is_finished(place: Path) -> bool:
    """Whether a run below `place` has finished."""
    return bool(list(place.glob("train/runs/*/finished")))


def finish_and_compare(folder: Path, place: Path, uninterrupted: Path, findings: Findings) -> None:
    """Resume a run to its end, and compare it with the folder of the uninterrupted run."""
    findings.runs += 1
    if not is_finished(place):
        ended = spawn("train", folder, *overrides(place))
        if ended.code != 0:
            findings.failed.append(f"{place.name}: exit code {ended.code}: {ended.err[-3000:]}")
            return
    begun = {path.parent.parent for path in place.glob("train/runs/*/checkpoints/*.ckpt")}
    if len(begun) != 1:  # a run without a checkpoint starts again in a new folder
        findings.failed.append(f"{place.name}: {len(begun)} runs with checkpoints, expected 1")
        return
    findings.differences += [f"{place.name}: {difference}" for difference in unlike(uninterrupted, begun.pop())]


def seconds_of(run: Path) -> float:
    """Return the seconds from the beginning of a run to its results, by its files."""
    return (run / "metrics.json").stat().st_mtime - (run / ".hydra" / "config.yaml").stat().st_mtime


def campaign_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command line with the options of all campaigns of interrupted runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def run_campaign(campaign: Callable[[Path], Findings]) -> None:
    """Run a campaign in a temporary folder, print its report and exit: code 1 if there is a fault."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of skipped events, which are under test here
    with tempfile.TemporaryDirectory() as folder:
        findings = campaign(Path(folder))
    print(findings.report())
    sys.exit(0 if findings.clean else 1)
