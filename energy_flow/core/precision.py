"""The dtypes of a module, and code that runs outside of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast is off; also on devices that have none, such as meta."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first parameter of floats; float32 for a module without, such as a quantised one."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)
