"""End runs by a signal at random moments, resume them, and compare with a run that was never stopped.

    python -m tests.campaigns.kill_and_resume --runs 30                  # SIGKILL
    python -m tests.campaigns.kill_and_resume --runs 30 --signal TERM    # or INT, Ctrl-C

Every run is ended one to three times and started again by the same command line, with resume=auto. At the end its
checkpoints, metrics.json, TensorBoard's and the CSV file's curves must be those of the uninterrupted run, bit for bit.
After SIGTERM and SIGINT a run must give their exit code, and print the step to resume from, which must be its last one.
"""

import argparse
import logging
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from energy_flow.checkpoints.format import load
from tests.campaigns.endings import Findings, begin, finish_and_compare, is_finished, overrides, seconds_of
from tests.cli.helpers import spawn, write_pairs

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 60.0  # seconds from a signal to the end


def campaign(
    folder: Path, runs: int, most_signals: int, seed: int, signum: signal.Signals = signal.SIGKILL
) -> Findings:
    """Run it in a folder; the same seed draws the same moments, as far as a machine repeats itself."""
    rng, findings = random.Random(seed), Findings()
    write_pairs(folder, seed=1)
    outcome = spawn("train", folder, *overrides(folder / "through"), check=True)
    span = seconds_of(outcome.folder)
    for number in range(runs):
        place = folder / f"run_{number}"
        for moment in [rng.uniform(0, span) for _ in range(rng.randint(1, most_signals))]:
            if is_finished(place):  # the last signal came after its end; another start would be a new run
                break
            _end(folder, place, moment, signum, findings)
        finish_and_compare(folder, place, outcome.folder, findings)
        print(f"{place.name}: {findings.events.total()} ended so far", flush=True)
    return findings


def _end(folder: Path, place: Path, moment: float, signum: signal.Signals, findings: Findings) -> None:
    """Start or resume a run, and end it `moment` seconds after it has begun to train."""
    process, stage = begin(folder, place)
    time.sleep(moment)
    if process.poll() is not None:
        process.communicate()
        return
    process.send_signal(signum)
    try:
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        findings.failed.append(f"{place.name}: not ended {PATIENCE:.0f} s after the signal")
        return
    if is_finished(place):  # it came after the run, while Python ended
        return
    writing = list(place.glob("train/runs/*/checkpoints/*.unfinished"))
    findings.events["writing a checkpoint" if writing else stage.read_text() or "changing stages"] += 1
    if process.returncode != CODES[signum]:
        findings.failed.append(f"{place.name}: exit code {process.returncode}, not {CODES[signum]}: {err[-500:]}")
    findings.look_at_checkpoints(place)
    if signum != signal.SIGKILL and stage.read_text() in ("training", "validation"):
        _check_nothing_lost(place, err, findings)


def _check_nothing_lost(place: Path, err: str, findings: Findings) -> None:
    """Check that a run prints the step of its checkpoint."""
    said = re.search(r"(?:terminated|interrupted) at step (\d+)\nto resume from step (\d+):\n", err)
    steps = [load(path)["global_step"] for path in place.glob("train/runs/*/checkpoints/last.ckpt")]
    if said is None or "Traceback" in err:
        findings.failed.append(f"{place.name}: doesn't say how to resume: {err[-500:]}")
    elif [int(said[1]), int(said[2])] != steps * 2:
        findings.failed.append(f"{place.name}: ended at step {said[1]}, resumes from {said[2]}, checkpoint of {steps}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--most-signals", type=int, default=3, help="to each run")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells what it leaves out: that is what is tested
    signum = signal.Signals[f"SIG{arguments.signal}"]
    with tempfile.TemporaryDirectory() as folder:
        findings = campaign(Path(folder), arguments.runs, arguments.most_signals, arguments.seed, signum)
    print(findings.report())
    sys.exit(0 if findings.clean else 1)


if __name__ == "__main__":
    main()
