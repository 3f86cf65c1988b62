"""Save the checkpoint from which a killed run resumes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import Field

from energy_flow.checkpoints.io import LAST
from energy_flow.checkpoints.lightning_loops import has_stepped, is_last_batch, validates_next
from energy_flow.settings import Remedy, checked_arguments
from energy_flow.training.callbacks.scalars import is_logging_batch


class LastCheckpoint(Checkpoint):
    """Save `last.ckpt` after every epoch, and within an epoch if the last one is older than `every_seconds`.

    Within an epoch it saves only after an optimiser step, because checkpoints contain no gradients. If a validation
    follows the step, it saves after the validation: a resumed run would skip a validation that had not run. For the
    same reason it saves the last step of an epoch after the end of the epoch.

    With several processes, the clock of the first one decides. The others wait for its answer, so it is asked in
    logging batches only.

    Args:
        dirpath: the folder.
        every_seconds: greater than 0.
        clock: returns seconds.

    Raises:
        ConfigError: a value is out of range; names its key.
    """

    @checked_arguments("callbacks.last_checkpoint")
    def __init__(
        self,
        dirpath: str,
        every_seconds: Annotated[float, Field(gt=0), Remedy("inf saves after every epoch only")],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
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
        if has_stepped(trainer) and not is_last_batch(trainer) and self._is_due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.world_size > 1 and not is_logging_batch(trainer):
            return False
        due: bool = trainer.strategy.broadcast(self._clock() - self._saved_at >= self._every_seconds)
        return due

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a debug run writes no files
            return
        trainer.save_checkpoint(Path(self.dirpath, LAST), weights_only=False)
        self._saved_at = self._clock()
