"""Resume training: find the checkpoint, check that it fits, tell the user how to continue an ended run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Trainer
from rich.console import Console

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.checkpoints.io import LAST, AtomicCheckpointIO, LoadedCheckpoint
from energy_flow.data import OwnData, RunData
from energy_flow.errors import CheckpointError, EnergyFlowError
from energy_flow.runs.checks import say_whose_data
from energy_flow.runs.job import resume_command
from energy_flow.runs.messages import unwritable
from energy_flow.runs.settings import TrainSettings
from energy_flow.training.module import EnergyFlowModule

log = logging.getLogger(__name__)
T = TypeVar("T")


def find_checkpoint(settings: TrainSettings) -> LoadedCheckpoint | None:
    """Load the checkpoint that a run resumes from; None: it starts anew. A CheckpointError if it can't be used."""
    if settings.resume is not None:
        return newest_valid(settings.checkpoint_folder)
    if settings.ckpt_path is None:
        return None
    try:
        return LoadedCheckpoint(settings.ckpt_path)
    except checkpoints.CorruptCheckpointError as error:
        raise checkpoints.refusal(Path(settings.ckpt_path).expanduser(), error) from error


def newest_valid(folder: Path) -> LoadedCheckpoint | None:
    """Load the checkpoint in a folder to resume from; None: there is none. A CheckpointError if all are corrupt."""
    newest, found = _read_newest(folder, LoadedCheckpoint), checkpoints.siblings(folder / LAST)
    if newest is None and found:
        raise CheckpointError(
            f"resume = auto: all checkpoints in {folder} are corrupt ({', '.join(path.name for path in found)}). "
            "Remove them to start anew"
        )
    return newest


def _read_newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """Read the newest checkpoint that isn't corrupt; None: there is none. Corrupt ones are named and left in place."""
    for path in checkpoints.siblings(folder / LAST):
        try:
            return read(path)
        except checkpoints.CorruptCheckpointError as error:
            log.warning("%s: corrupt (%s), not used", path, error)
    return None


def check_resume(resumed: LoadedCheckpoint, module: EnergyFlowModule, data: RunData, console: Console) -> None:
    """Raise a CheckpointError unless a checkpoint fits a module; print its step, and which data differ."""
    assert resumed.contents is not None
    compatibility.check_resume(resumed.contents, module.hparams, resumed.path)
    compatibility.check_weights(resumed.contents["state_dict"], module, resumed.path)
    say_whose_data(checkpoints.origin(resumed.contents)[1], data, console)
    if isinstance(data, OwnData) and not hasattr(data.loaders.train_dataloader(), "load_state_dict"):
        log.warning(
            "data._target_: its train_dataloader has no state_dict and load_state_dict: a run that resumes within an "
            "epoch begins with other batches than a run that was never stopped"
        )
    console.print(f"resuming from step {resumed.step} of {resumed.path}", highlight=False, soft_wrap=True)


def purge_step(settings: TrainSettings, resumed: LoadedCheckpoint | None) -> int | None:
    """The step from which loggers drop the points of a killed run; None: they drop none."""
    if resumed is not None:
        return resumed.step
    return 0 if settings.resume == "auto" else None


def check_written(trainer: Trainer, settings: TrainSettings) -> None:
    """Raise a CheckpointError if a checkpoint isn't on the disk: the best one there may not be the run's best one."""
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
    """The command that continues a run which ended early: from its newest checkpoint, or from the one it began with."""
    if last.is_file():
        return f"to resume from step {checkpoints.read_step(last)}:\n{resume_command(last)}"
    if resumed is not None:
        return f"to resume from the checkpoint that this run began with:\n{resume_command(resumed.path)}"
    return "there is no checkpoint yet to resume from"


def _with_resume_auto(settings: TrainSettings) -> str:
    """The effect of repeating the command with resume=auto; reads the step, but no weights."""
    step = _read_newest(settings.checkpoint_folder, checkpoints.read_step)
    if step is None:
        return "with resume=auto: no checkpoint could be written yet, so it starts anew"
    return f"with resume=auto, which finds this run: it resumes from step {step}"
