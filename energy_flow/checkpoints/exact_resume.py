"""What Lightning leaves out of a checkpoint, or gets wrong in one that was saved between two batches."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer


class ExactResume(Callback):
    """A run that goes on has the counters, the log and the random numbers of one that was never stopped.

    It stands before all other callbacks. Random states are those of the process that writes checkpoints: with several
    processes the others start anew from the seed (noise of the flows is counted, not drawn, so nothing in training
    depends on them).
    """

    def __init__(self) -> None:
        self._goes_on = False
        self._random: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # What was logged up to here must not get lost: a run that goes on doesn't log it again.
        pl_module.write_scalars(wait=True)
        for logger in trainer.loggers:
            logger.save()
        _forget_begun_batch(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"])

    def state_dict(self) -> dict[str, Any]:
        return {"random": _random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
        self._goes_on = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._random is not None and trainer.is_global_zero:
            _set_random_states(self._random)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._goes_on:
            # Lightning adds one to it, or not, by a guess at which hook has saved.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._goes_on = False


def _forget_begun_batch(progress: dict[str, Any]) -> None:
    """Between batches Lightning has counted the next one already, and taken note whether it is the last of its epoch.

    The epoch would seem to be at its end, or have a batch too much.
    """
    if progress["total"]["processed"] != progress["total"]["completed"]:
        return  # saved at the end of a batch, from where Lightning goes on as it should
    if progress["total"]["ready"] == progress["total"]["completed"]:
        return
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["started"] = counts["completed"]
    progress["is_last_batch"] = False


def _random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  # the stream that libraries use
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
    if 0 < len(states["cuda"]) == torch.cuda.device_count():  # else other devices: their streams have no counterpart
        torch.cuda.set_rng_state_all(states["cuda"])
