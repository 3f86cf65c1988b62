"""Choose who computes an operation: a Triton kernel or plain torch."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

# Triton reads this variable when a kernel is defined, so a later change has no effect.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels compute on this tensor. Plain torch computes on all others.

    Kernels need Triton and a CUDA device of compute capability 8.0 or more. For tests, they also run on a CPU in
    Triton's interpreter, if the environment variable TRITON_INTERPRET was 1 at the start.
    """
    if tensor.is_cuda:
        return has_triton() and device_properties(tensor.device).major >= 8
    return _INTERPRETED and tensor.device.type == "cpu" and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def device_properties(device: torch.device) -> torch.cuda._CudaDeviceProperties:
    """The properties of a CUDA device, read once."""
    return torch.cuda.get_device_properties(device)
