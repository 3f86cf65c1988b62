"""AdamW that can skip a step, its parameter groups, and its learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, did_you_mean

Rate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """AdamW with warm-up and cosine decay (config group `optimizer`)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup_steps: Annotated[int, Field(ge=0)]
    final_lr: Annotated[float, Field(ge=0, le=1)]
    freeze: list[str]


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that skips a step if its `found_inf` is 1, which it reads on the device.

    A skipped step changes neither the weights nor the moments nor the optimiser's step count.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        super().__init__(params, **options, fused=True)
        # Fused optimisers unscale gradients and skip steps themselves, so Lightning wouldn't clip their gradients.
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint may come from an optimiser that was not fused. Without `fused` no step can be skipped.
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


def freeze_parts(processor: FlowProcessor, names: list[str]) -> None:
    """Exclude parts of the flow lattice from training.

    Args:
        processor: the flow lattice; its parameters are changed in place.
        names: keys of `processor.trained_parts()`.

    Raises:
        ConfigError: there is no part of a name, or no part would be trained.
    """
    parts = processor.trained_parts()
    for index, name in enumerate(names):
        if name not in parts:
            raise ConfigError(
                f"optimizer.freeze[{index}] = {name!r}: no part with parameters; {did_you_mean(name, parts)}"
            )
        parts[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in processor.parameters()):
        raise ConfigError(f"optimizer.freeze = {names}: leaves nothing to train. Take a part out of it")


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[tuple[str, nn.Parameter]]) -> SkippingAdamW:
    """Build the optimiser of all named parameters that require gradients.

    Weight decay applies to matrices only: not to biases, norms and cell values.
    """
    trained = {name: p for name, p in parameters if p.requires_grad}
    decays = {name: p.ndim > 1 and not name.endswith("cell_value") for name, p in trained.items()}
    decayed = [p for name, p in trained.items() if decays[name]]
    rest = [p for name, p in trained.items() if not decays[name]]
    return SkippingAdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
    )


def build_schedule(settings: OptimizerSettings, optimizer: torch.optim.Optimizer, total_steps: float) -> LambdaLR:
    """Build the learning-rate schedule for `total_steps` optimiser steps.

    Raises:
        ConfigError: the number of steps is infinite.
    """
    if total_steps == math.inf:
        raise ConfigError(
            "trainer.max_epochs = -1: the cosine decay needs to know where a run ends. "
            "Set trainer.max_epochs or trainer.max_steps"
        )
    return LambdaLR(optimizer, lambda step: lr_factor(settings, step, int(total_steps)))


def lr_factor(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Factor of `lr` at a step: linear warm-up to 1, then half a cosine down to `final_lr` at the last step."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
