"""Make the disk of runs unwritable at random moments, restore it, and compare the runs with an uninterrupted run.

    python -m tests.campaigns.unwritable full --runs 30         # a small tmpfs; needs the right to mount it
    python -m tests.campaigns.unwritable read-only --runs 30    # a folder without write permission

A disk is too small from the beginning, or becomes full (or read-only) at a random moment, for good or for a while. A
run must end with exit code 1 and a short message, or with code 0 and all its files. Whole checkpoints stay whole. After
the disk is back, the same command, with resume=auto, must end like the uninterrupted run.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
from tests.cli.helpers import check_message, spawn, write_pairs

DISK_BYTES = 64 << 20
# The superuser may write anywhere, unless it gives up that right.
UNPRIVILEGED = (
    ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override") if os.geteuid() == 0 else ()
)
REASONS = {"full": ("No space left on device",), "read-only": ("Permission denied",)}


@dataclass
class Disk:
    """The folder of a run. `take` makes it unwritable, `give` makes it writable again."""

    place: Path
    take: Callable[[int], None]  # a tmpfs keeps this number of free bytes
    give: Callable[[], None]


@contextmanager
def small_disk(place: Path) -> Iterator[Disk]:
    """Mount a tmpfs.

    Raises:
        PermissionError: this process may not mount.
    """
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        raise PermissionError(f"can't mount a tmpfs: {mounted.stderr.decode().strip()}")
    ballast = place / "ballast"

    def take(left: int) -> None:
        state = os.statvfs(place)
        free = state.f_bavail * state.f_frsize - left
        if free > 0:
            with ballast.open("wb") as file, suppress(OSError):  # the run writes too
                os.posix_fallocate(file.fileno(), 0, free)

    try:
        yield Disk(place, take, lambda: ballast.unlink(missing_ok=True))
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def locked_folder(place: Path) -> Iterator[Disk]:
    """Make a folder that can lose and regain all write permissions."""
    place.mkdir()

    def change(writable: bool) -> None:
        for path in [place, *place.rglob("*")]:
            with suppress(FileNotFoundError):  # temporary files of the run
                path.chmod((0o755 if path.is_dir() else 0o644) if writable else (0o555 if path.is_dir() else 0o444))

    yield Disk(place, lambda left: change(False), lambda: change(True))


KINDS = {"full": small_disk, "read-only": locked_folder}


def campaign(kind: str, folder: Path, runs: int, seed: int) -> Findings:
    """Run the campaign in a folder. The seed sets the moments, as far as the machine repeats itself."""
    rng, findings = random.Random(seed), Findings()
    write_pairs(folder, seed=1)
    outcome = spawn("train", folder, *overrides(folder / "uninterrupted"), check=True)
    size = sum(path.stat().st_size for path in outcome.folder.rglob("*") if path.is_file())
    span = seconds_of(outcome.folder)
    for number in range(runs):
        with KINDS[kind](folder / f"run_{number}") as disk:
            _run(kind, folder, disk, size, span, rng, findings)
            disk.give()
            finish_and_compare(folder, disk.place, outcome.folder, findings)
        print(f"{disk.place.name}: {dict(findings.events)}", flush=True)
    return findings


def _run(kind: str, folder: Path, disk: Disk, size: int, span: float, rng: random.Random, findings: Findings) -> None:
    """Make the disk of one run unwritable. An uninterrupted run has `size` bytes and takes `span` seconds."""
    small = kind == "full" and rng.random() < 0.4
    if small:
        disk.take(int(rng.uniform(0, 1.3) * size))
    process, stage = begin(folder, disk.place, UNPRIVILEGED if kind == "read-only" else ())
    event = "too small from the beginning"
    if not small:
        time.sleep(rng.uniform(0, span))
        disk.take(0)
        event = f"taken in {stage.read_text() if stage.is_file() else 'the beginning'}"
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, span / 4))
            disk.give()
            event += " for a while"
    _, err = process.communicate(timeout=300)
    findings.events[f"{event}: exit code {process.returncode}"] += 1
    findings.check_checkpoints(disk.place)
    if process.returncode == 0:
        if not is_finished(disk.place):
            findings.failed.append(f"{disk.place.name}: {event}: exit code 0, but not finished")
        return
    try:
        check_message(err)
        assert any(reason in err for reason in REASONS[kind]), err
        assert process.returncode == 1, process.returncode
    except AssertionError as error:
        findings.failed.append(f"{disk.place.name}: {event}: {error}")


def main() -> None:
    parser = campaign_parser(__doc__)
    parser.add_argument("kind", choices=KINDS)
    own = parser.parse_args()
    if UNPRIVILEGED and not shutil.which(UNPRIVILEGED[0]):
        parser.error(f"the superuser needs {UNPRIVILEGED[0]} to give up its right to write anywhere")
    run_campaign(lambda folder: campaign(own.kind, folder, own.runs, own.seed))


if __name__ == "__main__":
    main()
