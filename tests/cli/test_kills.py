"""A run that is killed anywhere and resumed with resume=auto has the same weights, counters, curves and results."""

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from torch.utils.tensorboard import SummaryWriter

from energy_flow.runs import folder as run_folder
from energy_flow.runs.messages import unwritable
from tests.cli.helpers import Program, check_message
from tests.cli.same import curves, rows, unlike
from tests.cli.test_resume import BUSY, StopAt, checkpoint, differences

# Every step is saved; both loggers write every step.
OFTEN = (
    *BUSY,
    "callbacks.last_checkpoint.every_seconds=1e-9",
    "logger=[tensorboard,csv]",
    "trainer.log_every_n_steps=1",
)
EMA = ("+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.ema.decay=0.7")


def killed(program: Program, callback: Callback, *overrides: str) -> None:
    """Start a run that a callback ends with an error."""
    with pytest.raises(RuntimeError, match="power cut"):
        program.train(*overrides, more_callbacks=[callback])
    # TensorBoard sorts files by the second in their name, and two runs of one process can begin in the same second.
    for count, file in enumerate(sorted(program.folder.rglob("tensorboard/events*"))):
        file.rename(file.with_name(re.sub(r"\d{10}", f"{1000000000 + count}", file.name, count=1)))


def run_folders(program: Program) -> list[Path]:
    return sorted((program.folder / "logs" / "train" / "runs").glob("*"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.accumulate_grad_batches=3",),
        ("trainer.val_check_interval=0.5",),
        ("trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=3"),
        EMA,
    ],
    ids=" ".join,
)
def test_from_any_batch(program: Program, overrides: tuple[str, ...]) -> None:
    run = (*OFTEN, *overrides)
    uninterrupted = program.train(*run)
    assert (uninterrupted.code, uninterrupted.err) == (0, "")
    assert max(map(len, curves(uninterrupted.folder).values())) > 5
    for step in (3, 4, 6):  # of 4 in an epoch, 2 with accumulation
        here = f"hydra.run.dir={program.folder}/at_{step}"
        killed(program, StopAt(step, RuntimeError("power cut")), *run, here)
        last = torch.load(program.folder / f"at_{step}" / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == step
        torch.manual_seed(step)  # a resumed run must not depend on the state of the process
        program.patch.setattr(
            event_file_writer, "_global_uid", AtomicCounter(0)
        )  # the first file of a process, as after a kill
        outcome = program.train(*run, "resume=auto", here)
        assert (outcome.code, outcome.err) == (0, "")
        assert unlike(uninterrupted.folder, outcome.folder) == []


CUT = RuntimeError("power cut")


def test_the_newest_unfinished_run_of_the_config(program: Program) -> None:
    new = program.train(*BUSY, "resume=auto")
    assert (new.code, new.err) == (0, "")
    assert "no unfinished run with this config" in new.out
    for overrides in ((), (), ("seed=2",)):
        killed(program, StopAt(9, CUT), *BUSY, *overrides)
    finished, older, newer, other = run_folders(program)
    assert finished == new.folder
    described = newer / ".hydra" / "config.yaml"
    before = described.stat().st_mtime_ns
    outcome = program.train(*BUSY, "resume=auto")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"resume = auto: resuming {newer}, the newest of 2 unfinished runs" in outcome.out.replace("\n", "")
    assert "from step 9" in outcome.out
    assert outcome.folder == newer
    assert differences(checkpoint(finished), checkpoint(newer)) == []
    assert [run_folder.is_finished(folder) for folder in (finished, older, newer, other)] == [True, False, True, False]
    assert len(run_folders(program)) == 4
    assert described.stat().st_mtime_ns == before, "written again, although a kill meanwhile would leave half of it"


def test_a_finished_run_is_left_alone(program: Program) -> None:
    here = f"hydra.run.dir={program.folder}/run"
    first = program.train(*BUSY, here)
    before = (first.folder / "checkpoints" / "last.ckpt").stat()
    again = program.train(*BUSY, here, "resume=auto")
    assert (again.code, again.err) == (0, "")
    assert "finished already" in again.out
    assert (first.folder / "checkpoints" / "last.ckpt").stat() == before


def test_a_folder_with_a_run_is_not_overwritten(program: Program) -> None:
    here = f"hydra.run.dir={program.folder}/run"
    killed(program, StopAt(9, CUT), *BUSY, here)
    config = (program.folder / "run" / ".hydra" / "config.yaml").read_text()
    message = program.refused("seed=5", here)
    assert "holds a run, which would be overwritten. Continue it with resume=auto" in message
    message = program.refused(*BUSY, "seed=5", here, "resume=auto")
    assert "its run has another config, these keys differ: seed, data.seed" in message
    assert (program.folder / "run" / ".hydra" / "config.yaml").read_text() == config


def test_two_runs_at_once(program: Program) -> None:
    here = f"hydra.run.dir={program.folder}/run"
    killed(program, StopAt(9, CUT), *BUSY, here)
    with run_folder.locked(program.folder / "run"):
        assert "another process trains in it" in program.refused(*BUSY, here, "resume=auto")
    assert program.train(*BUSY, here, "resume=auto").code == 0


def test_only_one_way_to_resume_at_a_time(program: Program) -> None:
    assert "resume = auto and ckpt_path = a.ckpt: give one of them" in program.refused(
        "resume=auto", "ckpt_path=a.ckpt"
    )
    assert "resume = 'yes'" in program.refused("resume=yes")


def test_a_corrupt_last_checkpoint(program: Program) -> None:
    here, folder = f"hydra.run.dir={program.folder}/run", program.folder / "run" / "checkpoints"
    killed(program, StopAt(10, CUT), *OFTEN, here)
    last, before = folder / "last.ckpt", folder / "last-1.ckpt"
    assert [torch.load(path, weights_only=True)["global_step"] for path in (before, last)] == [10, 10], (
        "both from step 10: one of them after the error"
    )
    last.write_bytes(last.read_bytes()[:-1000])
    message = program.refused(*OFTEN, here, f"ckpt_path={last}")
    assert "corrupt, or no checkpoint" in message
    assert "Valid ones in its folder: last-1.ckpt, best.ckpt" in message
    (folder / "last.ckpt.unfinished").write_bytes(b"half")
    outcome = program.train(*OFTEN, here, "resume=auto")
    assert outcome.code == 0
    assert "last.ckpt: corrupt" in outcome.out
    assert "from step 10" in outcome.out
    assert not list(program.folder.rglob("*.unfinished"))
    assert unlike(program.train(*OFTEN).folder, outcome.folder) == []


def test_all_checkpoints_corrupt(program: Program) -> None:
    here, folder = f"hydra.run.dir={program.folder}/run", program.folder / "run" / "checkpoints"
    killed(program, StopAt(9, CUT), *BUSY, here)
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"")
    outcome = program.train(*BUSY, here, "resume=auto")
    assert outcome.code == 1
    assert "error: resume = auto: all checkpoints in" in outcome.err
    assert "Remove them to start anew" in outcome.err


class NoFolder(Callback):
    """Make the folder of checkpoints unwritable between two steps."""

    def __init__(self, folder: Path, steps: tuple[int, int]) -> None:
        self.folder, self.steps = folder, steps
        self.aside = folder.with_name("aside")

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps[0]:
            self.folder.rename(self.aside)
            self.folder.write_text("in the way")
        if trainer.global_step == self.steps[1]:
            self.put_back()

    def put_back(self) -> None:
        self.folder.unlink()
        self.aside.rename(self.folder)


@pytest.mark.parametrize("until", [14, 99])
def test_an_unwritable_last_checkpoint(program: Program, until: int) -> None:
    here = f"hydra.run.dir={program.folder}/run"
    fault = NoFolder(program.folder / "run" / "checkpoints", (10, until))
    outcome = program.train(*BUSY, "optimizer.lr=1e-5", here, more_callbacks=[fault])
    assert "last.ckpt: the checkpoint of step 12 can't be written (File exists)" in outcome.out
    if until == 14:
        assert outcome.code == 0
    else:
        assert outcome.code == 1
        check_message(outcome.err)
        assert "checkpoints could not be written" in outcome.err
        assert not (program.folder / "run" / "metrics.json").exists()
        fault.put_back()
        outcome = program.train(*BUSY, "optimizer.lr=1e-5", here, "resume=auto")
        assert (outcome.code, outcome.err) == (0, "")
        assert "from step 8" in outcome.out
    uninterrupted = program.train(*BUSY, "optimizer.lr=1e-5")
    assert differences(checkpoint(uninterrupted.folder), checkpoint(outcome.folder)) == []


def test_an_unwritable_best_checkpoint(program: Program) -> None:
    """The saved state must not give the old file the score of the lost one."""
    here = f"hydra.run.dir={program.folder}/run"
    fault = NoFolder(program.folder / "run" / "checkpoints", (6, 10))
    outcome = program.train(*BUSY, "optimizer.lr=0.01", "trainer.max_epochs=3", here, more_callbacks=[fault])
    assert "best.ckpt: the checkpoint of step 8 can't be written (File exists)" in outcome.out
    states = [
        state
        for name in ("best", "last")
        for key, state in checkpoint(outcome.folder, name)["callbacks"].items()
        if key.startswith("BestCheckpoint")
    ]
    assert states[0]["best_model_score"] == states[1]["best_model_score"]


def test_no_space_for_curves(program: Program) -> None:
    def no_room(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    program.patch.setattr(SummaryWriter, "add_scalar", no_room)
    outcome = program.train(*BUSY)
    assert outcome.code == 1
    check_message(outcome.err)
    assert "No space left on device. Make room and repeat the command with resume=auto" in outcome.err
    assert f"it resumes from step {checkpoint(outcome.folder)['global_step']}" in outcome.err


def test_an_incomplete_csv_row(program: Program) -> None:
    here, file = f"hydra.run.dir={program.folder}/run", program.folder / "run" / "csv" / "metrics.csv"
    killed(program, StopAt(9, CUT), *OFTEN, here)
    with file.open("a") as end:
        end.write(file.read_text().splitlines()[-1][:-1])
    outcome = program.train(*OFTEN, here, "resume=auto")
    assert (outcome.code, outcome.err) == (0, "")
    assert rows(outcome.folder) == rows(program.train(*OFTEN).folder)


def test_errors_of_an_unwritable_disk() -> None:
    assert unwritable(OSError(errno.ENOSPC, "No space left on device")) == (
        "the disk: No space left on device. Make room and repeat the command"
    )
    wrapped = ValueError("by a library")
    wrapped.__cause__ = PermissionError(errno.EACCES, "Permission denied", "a.csv")
    assert unwritable(wrapped) == "a.csv: Permission denied. Change its permissions and repeat the command"
    assert unwritable(PermissionError(errno.EPERM, "Operation not permitted")) is None  # also raised for processes
    assert unwritable(FileNotFoundError(errno.ENOENT, "No such file", "a.csv")) is None
