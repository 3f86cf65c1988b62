"""Complete Lightning's checkpoints: random states, and counts that are right between two batches."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from energy_flow.checkpoints.lightning_loops import TRAINING_BATCHES, set_logging_step


class ExactResume(Callback):
    """Give a resumed run the counters, the log and the random numbers of a run that was never stopped.

    It must be the first of all callbacks. The random states are those of the process that writes checkpoints. With
    several processes the others start anew from the seed; training doesn't depend on them, because the noise of the
    flows is a hash of counters.
    """

    def __init__(self) -> None:
        self._resumes = False
        self._random: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Bring everything logged so far to the disk: a resumed run doesn't log it again.
        pl_module.write_scalars(wait=True)
        for logger in trainer.loggers:
            logger.save()
        _uncount_begun_batch(checkpoint["loops"]["fit_loop"][TRAINING_BATCHES])

    def state_dict(self) -> dict[str, Any]:
        return {"random": _random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
        self._resumes = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._random is not None and trainer.is_global_zero:
            _set_random_states(self._random)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._resumes:
            # Lightning guesses which hook has saved, and so whether to add one to this step.
            set_logging_step(trainer, trainer.global_step)
            self._resumes = False


def _uncount_begun_batch(progress: dict[str, Any]) -> None:
    """Take back the count of a batch that has only begun, and the note whether it is the last one of its epoch.

    Lightning counts the next batch early. With its counts a resumed epoch would end at once, or have a batch too many.
    """
    total = progress["total"]
    at_end = total["processed"] != total["completed"]  # of a batch, where Lightning's counts are right
    if at_end or total["ready"] == total["completed"]:
        return
    for counts in (total, progress["current"]):
        counts["ready"] = counts["started"] = counts["completed"]
    progress["is_last_batch"] = False


def _random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  # libraries use this stream
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if 0 < len(states["cuda"]) == torch.cuda.device_count():  # on other devices these streams mean nothing
        torch.cuda.set_rng_state_all(states["cuda"])
