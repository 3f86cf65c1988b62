"""Optimisers that can skip a step, their parameter groups, and their learning-rate schedules."""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, did_you_mean, read
from energy_flow.targets import build, parameters_of

Rate = Annotated[float, Field(ge=0, lt=1)]
Section = dict[str, Any]


class OptimizerSettings(Settings):
    """AdamW, by default with warm-up and cosine decay (config group `optimizer`)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup_steps: Annotated[int, Field(ge=0)]
    final_lr: Annotated[float, Field(ge=0, le=1)]
    freeze: list[str]
    schedule: Section | None = None  # checkpoints of older versions have none


class OwnOptimizerSettings(Settings):
    """An optimiser of the class in `optimizer._target_`, with a constant learning rate unless there is a schedule."""

    entry: Section  # `_target_` and the arguments
    freeze: list[str] = Field(default_factory=list)
    schedule: Section | None = None


AnyOptimizerSettings = OptimizerSettings | OwnOptimizerSettings


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


def read_optimizer(section: Any) -> AnyOptimizerSettings:
    """Read the config section `optimizer`.

    Raises:
        ConfigError: a key is unknown, or a value is out of range.
    """
    if not isinstance(section, Mapping) or "_target_" not in section:
        return read(OptimizerSettings, section, "optimizer")
    rest = {name: section[name] for name in ("freeze", "schedule") if name in section}
    entry = {name: value for name, value in section.items() if name not in rest}
    return read(OwnOptimizerSettings, {"entry": entry, **rest}, "optimizer")


def build_optimizer(
    settings: AnyOptimizerSettings, parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Build the optimiser of all named parameters that require gradients.

    Weight decay applies to matrices only: not to biases, norms and cell values.

    Raises:
        ConfigError: an optimiser of one's own can't be built, or can't skip a step.
    """
    trained = {name: p for name, p in parameters if p.requires_grad}
    decays = {name: p.ndim > 1 and not name.endswith("cell_value") for name, p in trained.items()}
    decayed = [p for name, p in trained.items() if decays[name]]
    rest = [p for name, p in trained.items() if not decays[name]]
    if isinstance(settings, OwnOptimizerSettings):
        # An optimiser without weight decay doesn't read this entry of a group.
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        return skipping(build(settings.entry, "optimizer", {"params": groups}))
    return SkippingAdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
    )


def skipping(optimizer: Any) -> torch.optim.Optimizer:
    """Let an optimiser skip a step if its `found_inf` is 1, which the host reads.

    A skipped step calls nothing of the optimiser, so it changes neither the weights nor its state.

    Raises:
        ConfigError: it is no optimiser, or it must compute the loss itself, several times in a step.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer._target_: gives a {name}, not a torch.optim.Optimizer")
    step = optimizer.step
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer._target_: {name} computes the loss several times in a step, and bad steps can't be skipped "
            "then. Take an optimiser that steps once, such as torch.optim.AdamW"
        )

    def step_unless_bad(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()  # forward and backward pass; sets `found_inf`
        found = self.__dict__.pop("found_inf", None)  # torch's optimisers refuse it, apart from fused ones
        if found is None or not bool(found):
            step()
        return loss

    optimizer.step = types.MethodType(step_unless_bad, optimizer)  # type: ignore[method-assign]
    # Fused optimisers unscale gradients themselves, so Lightning wouldn't clip their gradients.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def build_schedule(settings: AnyOptimizerSettings, optimizer: torch.optim.Optimizer, total_steps: float) -> LRScheduler:
    """Build the learning-rate schedule for `total_steps` optimiser steps.

    A class of one's own gets `optimizer`, and `total_steps` if it has such an argument.

    Raises:
        ConfigError: the number of steps is infinite; or a schedule of one's own can't be built or used.
    """
    if settings.schedule is None and isinstance(settings, OwnOptimizerSettings):
        return LambdaLR(optimizer, lambda step: 1.0)
    given: dict[str, Any] = {"optimizer": optimizer}
    if total_steps != math.inf:
        given["total_steps"] = int(total_steps)
    if total_steps == math.inf and (settings.schedule is None or _needs_total_steps(settings.schedule)):
        raise ConfigError(
            "trainer.max_epochs = -1: the schedule of the learning rate needs to know where a run ends. "
            "Set trainer.max_epochs or trainer.max_steps"
        )
    if isinstance(settings, OptimizerSettings) and settings.schedule is None:
        return WarmupCosine(optimizer, int(total_steps), settings.warmup_steps, settings.final_lr)
    schedule = build(settings.schedule, "optimizer.schedule", given)
    if isinstance(schedule, LRScheduler) and not isinstance(schedule, ReduceLROnPlateau):
        return schedule
    raise ConfigError(
        f"optimizer.schedule: gives a {type(schedule).__name__}. Take a schedule of torch.optim.lr_scheduler that "
        "depends on the number of steps alone"
    )


def _needs_total_steps(section: Mapping[str, Any]) -> bool:
    """Whether a schedule's section leaves it to the run how many steps there are."""
    return "total_steps" not in section and "total_steps" in parameters_of(section, "optimizer.schedule")


class WarmupCosine(LambdaLR):
    """Linear warm-up to the learning rate, then half a cosine down to its share `final_lr` at the last step.

    Args:
        optimizer: sets the learning rate.
        total_steps: optimiser steps of the run.
        warmup_steps: of the warm-up.
        final_lr: share of the learning rate, from 0 to 1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, final_lr: float = 0.0
    ) -> None:

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
