"""Kills runs by SIGKILL at random moments, lets them go on, and compares with a run that nothing stopped.

    python -m tests.campaigns.kill_and_resume --runs 30

Every run is killed one to three times and started again by the same command line, with resume=auto. At its end
checkpoints, metrics.json, TensorBoard's and the CSV file's curves must be those of the uninterrupted run, bit for bit.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from energy_flow.training.checkpoint import damage
from tests.cli.helpers import spawn, start, write_pairs
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
    """What a campaign saw."""

    runs: int = 0
    kills: int = 0
    stages: Counter[str] = field(default_factory=Counter)  # what the killed runs were doing
    unreadable: list[str] = field(default_factory=list)  # last.ckpt that were there and not whole
    unlike: list[str] = field(default_factory=list)  # differences to the uninterrupted run
    failed: list[str] = field(default_factory=list)  # runs that didn't go on

    def report(self) -> str:
        stages = ", ".join(f"{count} in {stage}" for stage, count in self.stages.most_common())
        lines = [
            f"{self.runs} runs, {self.kills} kills: {stages}",
            f"unreadable last.ckpt: {len(self.unreadable)}",
            f"runs that did not go on: {len(self.failed)}",
            f"differences to the uninterrupted run: {len(self.unlike)}",
        ]
        return "\n".join([*lines, *self.unreadable, *self.failed, *self.unlike])

    @property
    def clean(self) -> bool:
        return not (self.unreadable or self.unlike or self.failed)


def campaign(folder: Path, runs: int, most_kills: int, seed: int) -> Findings:
    """Run it in a folder; the same seed draws the same moments, as far as a machine repeats itself."""
    rng, findings = random.Random(seed), Findings()
    write_pairs(folder, seed=1)
    through = _overrides(folder / "through")
    outcome = spawn("train", folder, *through, check=True)
    span = _training_seconds(folder / "through")
    for number in range(runs):
        place = folder / f"run_{number}"
        _run(folder, place, [rng.uniform(0, span) for _ in range(rng.randint(1, most_kills))], findings)
        findings.runs += 1
        if not list(place.glob("train/runs/*/finished")):
            ended = spawn("train", folder, *_overrides(place))
            if ended.code != 0:
                findings.failed.append(f"{place.name}: exit code {ended.code}: {ended.err[-500:]}")
                continue
        begun = {path.parent.parent for path in place.glob("train/runs/*/checkpoints/*.ckpt")}
        if len(begun) != 1:  # killed before its first checkpoint a run has nothing to go on from
            findings.failed.append(f"{place.name}: {len(begun)} runs with checkpoints where one goes on")
            continue
        findings.unlike += [f"{place.name}: {what}" for what in unlike(outcome.folder, begun.pop())]
        print(f"{place.name}: {findings.kills} kills so far", flush=True)
    return findings


def _overrides(place: Path) -> tuple[str, ...]:
    where = (f"+callbacks.where.file={place}.stage", "+callbacks.where._target_=tests.campaigns.where.Where")
    return (*RUN, *where, f"paths.log_dir={place}", "resume=auto")


def _training_seconds(place: Path) -> float:
    """From the beginning of a run to its results, by its files."""
    [begun] = place.glob("train/runs/*/.hydra/config.yaml")
    [ended] = place.glob("train/runs/*/metrics.json")
    return ended.stat().st_mtime - begun.stat().st_mtime


def _run(folder: Path, place: Path, moments: list[float], findings: Findings) -> None:
    for moment in moments:
        if list(place.glob("train/runs/*/finished")):  # the last kill came after the end: the next would be a new run
            return
        stage = Path(f"{place}.stage")
        stage.unlink(missing_ok=True)
        process = start("train", folder, *_overrides(place))
        end = time.monotonic() + WAIT
        while process.poll() is None and not stage.is_file() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(moment)
        if process.poll() is not None:
            process.communicate()
            return
        process.kill()
        process.communicate()
        findings.kills += 1
        writing = list(place.glob("train/runs/*/checkpoints/*.unfinished"))
        findings.stages["writing a checkpoint" if writing else stage.read_text() or "changing stages"] += 1
        for last in place.glob("train/runs/*/checkpoints/last.ckpt"):
            reason = damage(last)
            if reason is not None:
                findings.unreadable.append(f"{last}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--most-kills", type=int, default=3, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells what it leaves out: that is what is tested
    with tempfile.TemporaryDirectory() as folder:
        findings = campaign(Path(folder), arguments.runs, arguments.most_kills, arguments.seed)
    print(findings.report())
    sys.exit(0 if findings.clean else 1)


if __name__ == "__main__":
    main()
