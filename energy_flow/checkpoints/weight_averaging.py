"""Checkpoints of Lightning's `WeightAveraging`: the step count that it averages, and the weights that it swaps.

The callback averages every buffer, also the number of optimiser steps, by which flows move. It saves the averages in
`state_dict`, and the trained weights in `current_model_state`. During a validation the two models are swapped.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging

from energy_flow.checkpoints.lightning_loops import is_fitting

TRAINED = "current_model_state"
STEPS = "processor.optimizer_step"


def correct_saved(checkpoint: dict[str, Any], module: LightningModule, *, validating: bool) -> None:
    """Correct a checkpoint that is about to be written.

    Args:
        checkpoint: after the hooks of all callbacks; changed in place.
        module: the module that is trained.
        validating: whether an epoch of validation runs.
    """
    if TRAINED not in checkpoint:
        return
    if validating and any(_swaps(callback) for callback in module.trainer.callbacks):  # type: ignore[attr-defined]
        checkpoint["state_dict"], checkpoint[TRAINED] = checkpoint[TRAINED], checkpoint["state_dict"]
    _set_steps(checkpoint)


def correct_loaded(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Correct a checkpoint that was read, before a callback reads it; changed in place.

    A run that resumes takes the trained weights. Every test takes the averages, as one without the callback does.
    """
    if TRAINED not in checkpoint:
        return
    _set_steps(checkpoint)
    if not is_fitting(module):
        checkpoint[TRAINED] = checkpoint["state_dict"]


def _set_steps(checkpoint: dict[str, Any]) -> None:
    for section in ("state_dict", TRAINED):
        # A new tensor: the checkpoint shares the old one with a model.
        checkpoint[section] = {**checkpoint[section], STEPS: torch.tensor(checkpoint.get("global_step", 0))}


def _swaps(callback: Any) -> bool:
    start = WeightAveraging.on_validation_epoch_start
    return isinstance(callback, WeightAveraging) and type(callback).on_validation_epoch_start is start
