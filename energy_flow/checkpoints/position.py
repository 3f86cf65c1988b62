"""Where a training can go on from: between two optimiser steps, with every count as it was there."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer


@dataclass(frozen=True)
class LoopPosition:
    """What a checkpoint would have said between two steps, without the weights.

    Lightning's counts run ahead of the weights: those of a batch that was begun, of gradients that were accumulated and
    are lost, of a validation that is broken off. A checkpoint with these counts goes on as if nothing had happened.

    Attributes:
        loops, callbacks: the sections of these names of a checkpoint.
        versions: of all that the optimiser writes.
    """

    loops: dict[str, Any]
    callbacks: dict[str, Any]
    versions: list[int]

    @classmethod
    def here(cls, trainer: Trainer) -> "LoopPosition":
        """That of this moment; without waiting for the device."""
        loops = {"fit_loop": trainer.fit_loop.state_dict()}
        callbacks = {callback.state_key: callback.state_dict() for callback in _callbacks(trainer)}
        return cls(
            copy.deepcopy(loops),
            copy.deepcopy({key: state for key, state in callbacks.items() if state}),
            versions(trainer),
        )

    @classmethod
    def before_validation(cls, trainer: Trainer) -> "LoopPosition":
        """That of a validation about to begin; going on begins it anew."""
        boundary = cls.here(trainer)
        progress = boundary.loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):  # as in its first batch: Lightning skips it otherwise
            counts["ready"] += 1
            counts["started"] += 1
        return boundary

    def holds(self, trainer: Trainer) -> bool:
        """Whether no weight has been written since."""
        return self.versions == versions(trainer)

    def write_into(self, checkpoint: dict[str, Any]) -> None:
        """Put its counts in the place of those of now."""
        checkpoint["loops"] = {**checkpoint["loops"], **self.loops}
        checkpoint["callbacks"] = self.callbacks


def _callbacks(trainer: Trainer) -> Any:
    return trainer.callbacks  # type: ignore[attr-defined]


def versions(trainer: Trainer) -> list[int]:
    """How often each weight and each part of the optimiser's state has been written."""
    values = [value for group in trainer.optimizers for state in group.state.values() for value in state.values()]
    tensors = [*trainer.lightning_module.parameters(), *(v for v in values if isinstance(v, torch.Tensor))]
    return [tensor._version for tensor in tensors]
