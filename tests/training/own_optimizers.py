"""Optimisers and schedules as a user writes them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Counting(torch.optim.SGD):
    """Counts its steps in the parameter groups, as schedule-free optimisers do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


class Searching(torch.optim.SGD):
    """Computes the loss several times in a step."""

    def step(self, closure: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        return closure()


class Halved(torch.optim.lr_scheduler.LambdaLR):
    """Half of the learning rate from the middle of the run."""

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        super().__init__(optimizer, lambda step: 1.0 if 2 * step < total_steps else 0.5)
