"""End runs by a signal at random moments, resume them, and compare them with an uninterrupted run.

    python -m tests.campaigns.kill_and_resume --runs 30                  # SIGKILL
    python -m tests.campaigns.kill_and_resume --runs 30 --signal TERM    # or INT, Ctrl-C

Every run is ended one to three times. The same command line, with resume=auto, starts it again. At its end
checkpoints, metrics.json and the curves of TensorBoard and the CSV file must equal the uninterrupted run, bit for bit.
After SIGTERM and SIGINT, a run must give the right exit code and name the step to resume from, which is its last step.
"""

import random
import re
import signal
import subprocess
import time
from pathlib import Path

from energy_flow.checkpoints.format import load
from tests.campaigns.interrupted_runs import (
    Findings,
    begin,
    campaign_parser,
    finish_and_compare,
    is_finished,
    overrides,
    run_campaign,
    seconds_of,
)
from tests.cli.helpers import spawn, write_pairs

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
END_SECONDS = 60.0  # from a signal to the end of the run, at most


def campaign(
    folder: Path, runs: int, most_signals: int, seed: int, signum: signal.Signals = signal.SIGKILL
) -> Findings:
    """Run the campaign in a folder. The seed sets the moments, as far as the machine repeats itself."""
    rng, findings = random.Random(seed), Findings()
    write_pairs(folder, seed=1)
    outcome = spawn("train", folder, *overrides(folder / "uninterrupted"), check=True)
    span = seconds_of(outcome.folder)
    for number in range(runs):
        place = folder / f"run_{number}"
        for moment in [rng.uniform(0, span) for _ in range(rng.randint(1, most_signals))]:
            if is_finished(place):  # the last signal came after the end; the next start would be a new run
                break
            _interrupt(folder, place, moment, signum, findings)
        finish_and_compare(folder, place, outcome.folder, findings)
        print(f"{place.name}: {findings.events.total()} interruptions so far", flush=True)
    return findings


def _interrupt(folder: Path, place: Path, moment: float, signum: signal.Signals, findings: Findings) -> None:
    """Start or resume a run, and send it a signal `moment` seconds after training has begun."""
    process, stage = begin(folder, place)
    time.sleep(moment)
    if process.poll() is not None:
        process.communicate()
        return
    process.send_signal(signum)
    try:
        _, err = process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        findings.failed.append(f"{place.name}: still running {END_SECONDS:.0f} s after the signal")
        return
    if is_finished(place):  # the signal came after the run, while Python exited
        return
    writing = list(place.glob("train/runs/*/checkpoints/*.unfinished"))
    findings.events["writing a checkpoint" if writing else stage.read_text() or "changing stages"] += 1
    if process.returncode != CODES[signum]:
        findings.failed.append(f"{place.name}: exit code {process.returncode}, not {CODES[signum]}: {err[-500:]}")
    findings.check_checkpoints(place)
    if signum != signal.SIGKILL and stage.read_text() in ("training", "validation"):
        _check_step(place, err, findings)


def _check_step(place: Path, err: str, findings: Findings) -> None:
    """Compare the steps in the message of an interrupted run with the step of its checkpoint."""
    message = re.search(r"(?:terminated|interrupted) at step (\d+)\nto resume from step (\d+):\n", err)
    steps = [load(path)["global_step"] for path in place.glob("train/runs/*/checkpoints/last.ckpt")]
    if message is None or "Traceback" in err:
        findings.failed.append(f"{place.name}: no message how to resume: {err[-500:]}")
    elif [int(message[1]), int(message[2])] != steps * 2:
        findings.failed.append(
            f"{place.name}: ended at step {message[1]}, resumes from {message[2]}, checkpoint of {steps}"
        )


def main() -> None:
    parser = campaign_parser(__doc__)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--most-signals", type=int, default=3, help="to each run")
    own = parser.parse_args()
    signum = signal.Signals[f"SIG{own.signal}"]
    run_campaign(lambda folder: campaign(folder, own.runs, own.most_signals, own.seed, signum))


if __name__ == "__main__":
    main()
