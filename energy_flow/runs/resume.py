"""Resume training: find the checkpoint, check that it fits, tell the user how to continue an ended run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from rich.console import Console

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.checkpoints.io import LAST, AtomicCheckpointIO, LoadedCheckpoint
from energy_flow.data import EnergyDataModule
from energy_flow.errors import CheckpointError, EnergyFlowError
from energy_flow.runs.checks import say_whose_data
from energy_flow.runs.job import resume_command
from energy_flow.runs.messages import unwritable
from energy_flow.runs.settings import TrainSettings
from energy_flow.training.module import EnergyFlowModule

log = logging.getLogger(__name__)


def find_checkpoint(settings: TrainSettings) -> LoadedCheckpoint | None:
    """Load the checkpoint that a run resumes from; None: it starts anew.

    Raises:
        CheckpointError: it can't be used, or with `resume=auto` all are corrupt.
    """
    if settings.resume is not None:
        return newest_valid(settings.checkpoint_folder)
    if settings.ckpt_path is None:
        return None
    try:
        return LoadedCheckpoint(settings.ckpt_path)
    except checkpoints.CorruptCheckpointError as error:
        raise checkpoints.refusal(Path(settings.ckpt_path).expanduser(), error) from error


def newest_valid(folder: Path) -> LoadedCheckpoint | None:
    """Load the checkpoint in a folder to resume from; None: there is none. Corrupt ones are named and left in place.

    Raises:
        CheckpointError: there are some, and all are corrupt.
    """
    found = checkpoints.siblings(folder / LAST)
    for path in found:
        try:
            return LoadedCheckpoint(path)
        except checkpoints.CorruptCheckpointError as error:
            log.warning("%s: corrupt (%s), not used", path, error)
    if found:
        raise CheckpointError(
            f"resume = auto: all checkpoints in {folder} are corrupt ({', '.join(path.name for path in found)}). "
            "Remove them to start anew"
        )
    return None


def check_resume(resumed: LoadedCheckpoint, module: EnergyFlowModule, data: EnergyDataModule, console: Console) -> None:
    """Check that a module can resume from a checkpoint; print the step, and which data differ.

    Raises:
        CheckpointError: another architecture, other weights or another optimiser.
    """
    assert resumed.contents is not None
    compatibility.check_resume(resumed.contents, module.hparams, resumed.path)
    compatibility.check_weights(resumed.contents["state_dict"], module, resumed.path)
    say_whose_data(checkpoints.origin(resumed.contents)[1], data, console)
    console.print(f"resuming from step {resumed.step} of {resumed.path}", highlight=False, soft_wrap=True)


def purge_step(settings: TrainSettings, resumed: LoadedCheckpoint | None) -> int | None:
    """The step from which loggers drop the points of a killed run; None: they drop none."""
    if resumed is not None:
        return resumed.step
    return 0 if settings.resume == "auto" else None


def check_written(trainer: Trainer, settings: TrainSettings) -> None:
    """Check at the end of training that every checkpoint is on the disk.

    Raises:
        CheckpointError: one isn't, so the best one on the disk may not be the best one of the run.
    """
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    failed = trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failed)
    if failed:
        listed = "\n".join(f"  {path}: {reason}" for path, reason in failed.items())
        raise CheckpointError(
            f"training has ended, and checkpoints could not be written:\n{listed}\nMake room and repeat the command "
            f"{_with_resume_auto(settings)}, and then tests"
        )


@contextmanager
def unwritable_explained(settings: TrainSettings) -> Iterator[None]:
    """Explain errors of a disk that can't be written, with the step that the repeated command resumes from."""
    try:
        yield
    except (OSError, ValueError) as error:  # Lightning turns an error of TensorBoard's into a ValueError
        found = unwritable(error)
        if found is None:
            raise
        raise EnergyFlowError(f"{found} {_with_resume_auto(settings)}") from error


def how_to_resume(last: Path, resumed: LoadedCheckpoint | None) -> str:
    """The command that continues a run that ended early.

    Args:
        last: the newest checkpoint of the run, if it was written.
        resumed: the checkpoint that the run itself resumed from.
    """
    if last.is_file():
        return f"to resume from step {checkpoints.read_step(last)}:\n{resume_command(last)}"
    if resumed is not None:
        return f"to resume from the checkpoint that this run began with:\n{resume_command(resumed.path)}"
    return "there is no checkpoint yet to resume from"


def _with_resume_auto(settings: TrainSettings) -> str:
    """The effect of repeating the command with resume=auto; reads the step, but no weights."""
    for path in checkpoints.siblings(settings.checkpoint_folder / LAST):
        try:
            return f"with resume=auto, which finds this run: it resumes from step {checkpoints.read_step(path)}"
        except checkpoints.CorruptCheckpointError as error:
            log.warning("%s: corrupt (%s), not used", path, error)
    return "with resume=auto: no checkpoint could be written yet, so it starts anew"
