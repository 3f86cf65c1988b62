"""A position of training to resume from: between two optimiser steps, with all counts as they were there."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from energy_flow.checkpoints.lightning_loops import VALIDATION_BATCHES


@dataclass(frozen=True)
class LoopPosition:
    """A checkpoint between two steps, without the weights.

    Lightning's counts run ahead of the weights: they include a batch that has only begun, accumulated gradients that
    will be lost, a validation that will be interrupted. A checkpoint with the counts of this position resumes as if
    none of these had happened.
    """

    loops: dict[str, Any]  # a section of a checkpoint
    callbacks: dict[str, Any]  # a section of a checkpoint
    versions: list[int]  # of every tensor that the optimiser writes

    @classmethod
    def here(cls, trainer: Trainer) -> "LoopPosition":
        """The position of this moment; doesn't wait for the device."""
        loops = {"fit_loop": trainer.fit_loop.state_dict()}
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
        callbacks = {key: state for key, state in states.items() if state}
        return cls(copy.deepcopy(loops), copy.deepcopy(callbacks), versions(trainer))

    @classmethod
    def before_validation(cls, trainer: Trainer) -> "LoopPosition":
        """The position at the start of a validation; a run that resumes here begins the validation anew."""
        position = cls.here(trainer)
        progress = position.loops["fit_loop"][VALIDATION_BATCHES]
        for counts in (progress["total"], progress["current"]):  # as in its first batch; otherwise Lightning skips it
            counts["ready"] += 1
            counts["started"] += 1
        return position

    def is_current(self, trainer: Trainer) -> bool:
        """Whether no weight has been written since."""
        return self.versions == versions(trainer)

    def write_into(self, checkpoint: dict[str, Any]) -> None:
        """Replace the counts of a checkpoint by those of this position."""
        checkpoint["loops"] = {**checkpoint["loops"], **self.loops}
        checkpoint["callbacks"] = self.callbacks


def versions(trainer: Trainer) -> list[int]:
    """How often each weight and each part of the optimiser's state has been written."""
    values = [value for group in trainer.optimizers for state in group.state.values() for value in state.values()]
    tensors = [*trainer.lightning_module.parameters(), *(v for v in values if isinstance(v, torch.Tensor))]
    return [tensor._version for tensor in tensors]
