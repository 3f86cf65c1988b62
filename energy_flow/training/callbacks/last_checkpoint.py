"""The checkpoint that a killed run goes on from."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import field_validator

from energy_flow.checkpoints.io import LAST
from energy_flow.checkpoints.lightning_loops import has_stepped, is_last_batch, validates_next
from energy_flow.settings import Settings, read
from energy_flow.training.callbacks.scalars import is_logging_batch


class LastCheckpointSettings(Settings):
    """Config section `callbacks.last_checkpoint`."""

    dirpath: str
    every_seconds: float

    @field_validator("every_seconds")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not value > 0:
            raise ValueError("must be greater than 0; inf saves after every epoch and not in between")
        return value


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after every epoch, and within an epoch when the last one is older than `every_seconds`.

    Only after an optimiser step, because gradients are not saved. Where a validation follows, it is saved after that;
    where an epoch ends, after its end: Lightning would leave out a validation that had not run. With several processes
    the first one's clock counts and is asked at logging batches only, because the others wait for its answer.

    Args:
        dirpath: the folder.
        every_seconds: greater than 0.
        clock: seconds.

    Raises:
        ConfigError: a value out of its range, with its key.
    """

    def __init__(self, dirpath: str, every_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        read(LastCheckpointSettings, {"dirpath": dirpath, "every_seconds": every_seconds}, "callbacks.last_checkpoint")
        self.dirpath = dirpath
        self._every_seconds, self._clock = every_seconds, clock
        self._saved_at = clock()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._saved_at = self._clock()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not has_stepped(trainer) or is_last_batch(trainer):
            return
        if not validates_next(trainer) and self._is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if not has_stepped(trainer) or is_last_batch(trainer):
            return
        if self._is_due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.world_size > 1 and not is_logging_batch(trainer):
            return False
        due: bool = trainer.strategy.broadcast(self._clock() - self._saved_at >= self._every_seconds)
        return due

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # leaves nothing behind
            return
        trainer.save_checkpoint(Path(self.dirpath, LAST), weights_only=False)
        self._saved_at = self._clock()
