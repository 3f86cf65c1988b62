"""Checkpoints of Lightning's `WeightAveraging`: the step count that it averages, and the weights that it swaps.

The callback averages every buffer, also the number of optimiser steps, by which flows move. It saves the averages in
`state_dict`, and the trained weights in `current_model_state`. During a validation the two models are swapped.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from energy_flow.checkpoints.lightning_loops import is_fitting

TRAINED = "current_model_state"
STEPS = "processor.optimizer_step"


def copy_weights(module: LightningModule) -> list[Tensor]:
    """Copies of all weights before a callback may swap them; nothing without such a callback."""
    if not _averages(module):
        return []
    return [parameter.detach().clone() for parameter in module.parameters()]


def are_swapped(module: LightningModule, copies: list[Tensor]) -> bool:
    """Whether the weights differ from those copies: a subclass of the callback may swap, or leave it out."""
    return any(not torch.equal(*pair) for pair in zip(copies, module.parameters(), strict=False))


def correct_saved(checkpoint: dict[str, Any], *, swapped: bool) -> None:
    """Correct a checkpoint that is about to be written.

    Args:
        checkpoint: after the hooks of all callbacks; changed in place.
        swapped: whether the module has the averages at the moment, and the callback the trained weights.
    """
    if TRAINED not in checkpoint:
        return
    if swapped:
        checkpoint["state_dict"], checkpoint[TRAINED] = checkpoint[TRAINED], checkpoint["state_dict"]
    _set_steps(checkpoint)


def correct_loaded(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Correct a checkpoint that was read, before a callback reads it; changed in place.

    A run that resumes takes the trained weights, with the callback or without it. Every test takes the averages.
    """
    if TRAINED not in checkpoint:
        return
    _set_steps(checkpoint)
    if not is_fitting(module):
        checkpoint[TRAINED] = checkpoint["state_dict"]
    elif not _averages(module):
        checkpoint["state_dict"] = checkpoint[TRAINED]


def _averages(module: LightningModule) -> bool:
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, WeightAveraging) for callback in callbacks)


def _set_steps(checkpoint: dict[str, Any]) -> None:
    for section in ("state_dict", TRAINED):
        # A new tensor: the checkpoint shares the old one with a model.
        checkpoint[section] = {**checkpoint[section], STEPS: torch.tensor(checkpoint.get("global_step", 0))}
