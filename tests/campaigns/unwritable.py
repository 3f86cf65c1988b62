"""Make the disk of runs unwritable at random moments, give it back, and compare with a run that always had it.

    python -m tests.campaigns.unwritable full --runs 30         # a small tmpfs; needs the right to mount one
    python -m tests.campaigns.unwritable read-only --runs 30    # a folder that can't be written

A disk is too small from the beginning, or becomes full (read-only) at some moment, for good or for a while. A run must
end with exit code 1 and a short message, or with 0 and everything written; valid checkpoints stay valid. After the disk
is writable again the same command, which has resume=auto, must end like the run that always had it.
"""

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.endings import Findings, begin, finish_and_compare, is_finished, overrides, seconds_of
from tests.cli.helpers import check_message, spawn, write_pairs

ROOM = 64 << 20  # bytes of the small disk
# For the superuser nothing is read-only, unless it drops this capability.
AS_OTHERS = ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override") if os.geteuid() == 0 else ()
REASONS = {"full": ("No space left on device",), "read-only": ("Permission denied",)}


@dataclass
class Disk:
    """A folder for a run, and functions that make it unwritable and writable."""

    place: Path
    take: Callable[[int], None]  # leaves so many bytes, if the disk is of that kind
    give: Callable[[], None]


@contextmanager
def small_disk(place: Path) -> Iterator[Disk]:
    """A tmpfs.

    Raises:
        PermissionError: mounting isn't allowed here.
    """
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        raise PermissionError(f"can't mount a tmpfs: {mounted.stderr.decode().strip()}")
    ballast = place / "ballast"

    def take(left: int) -> None:
        state = os.statvfs(place)
        free = state.f_bavail * state.f_frsize - left
        if free > 0:
            with ballast.open("wb") as file, suppress(OSError):  # the run writes, too
                os.posix_fallocate(file.fileno(), 0, free)

    try:
        yield Disk(place, take, lambda: ballast.unlink(missing_ok=True))
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def locked_folder(place: Path) -> Iterator[Disk]:
    """A folder whose files and folders become read-only."""
    place.mkdir()

    def change(writable: bool) -> None:
        for path in [place, *place.rglob("*")]:
            with suppress(FileNotFoundError):  # temporary files of the run
                path.chmod((0o755 if path.is_dir() else 0o644) if writable else (0o555 if path.is_dir() else 0o444))

    yield Disk(place, lambda left: change(False), lambda: change(True))


KINDS = {"full": small_disk, "read-only": locked_folder}


def campaign(kind: str, folder: Path, runs: int, seed: int) -> Findings:
    """Run it in a folder; the same seed draws the same moments, as far as a machine repeats itself."""
    rng, findings = random.Random(seed), Findings()
    write_pairs(folder, seed=1)
    outcome = spawn("train", folder, *overrides(folder / "through"), check=True)
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
    """One run whose disk becomes unwritable; the whole run takes `size` bytes and `span` seconds."""
    small = kind == "full" and rng.random() < 0.4
    if small:
        disk.take(int(rng.uniform(0, 1.3) * size))
    process, stage = begin(folder, disk.place, AS_OTHERS if kind == "read-only" else ())
    what = "too small from the beginning"
    if not small:
        time.sleep(rng.uniform(0, span))
        disk.take(0)
        what = f"taken in {stage.read_text() if stage.is_file() else 'the beginning'}"
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, span / 4))
            disk.give()
            what += " for a while"
    _, err = process.communicate(timeout=300)
    findings.events[f"{what}: exit code {process.returncode}"] += 1
    findings.look_at_checkpoints(disk.place)
    if process.returncode == 0:
        if not is_finished(disk.place):
            findings.failed.append(f"{disk.place.name}: {what}: exit code 0, and not finished")
        return
    try:
        check_message(err)
        assert any(reason in err for reason in REASONS[kind]), err
        assert process.returncode == 1, process.returncode
    except AssertionError as error:
        findings.failed.append(f"{disk.place.name}: {what}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells what it leaves out: that is what is tested
    if AS_OTHERS and not shutil.which(AS_OTHERS[0]):
        parser.error(f"as the superuser it needs {AS_OTHERS[0]}")
    with tempfile.TemporaryDirectory() as folder:
        findings = campaign(arguments.kind, Path(folder), arguments.runs, arguments.seed)
    print(findings.report())
    sys.exit(0 if findings.clean else 1)


if __name__ == "__main__":
    main()
