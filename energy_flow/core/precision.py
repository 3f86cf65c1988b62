"""The dtypes of a module, and code that runs outside of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast is off; the device meta has none."""
    # torch.compile can't follow `torch.amp.is_autocast_available`.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first parameter of floats; float32 for a module without, such as a quantised one."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)
