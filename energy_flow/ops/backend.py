"""Who computes a hand-written kernel: Triton or plain torch."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

# Triton reads it while kernels are defined: it says the same of all of them from then on.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor; plain torch takes all others.

    They take tensors on CUDA devices of compute capability 8.0 or more where Triton is installed, and for tests
    those on a CPU, in Triton's interpreter, if the environment variable TRITON_INTERPRET was 1 from the start.
    """
    if tensor.is_cuda:
        return has_triton() and _properties(tensor.device).major >= 8
    return _INTERPRETED and tensor.device.type == "cpu" and has_triton()


def num_multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's CUDA device; 1 for a CPU, where Triton's interpreter runs one program after the other."""
    return _properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def require_adjacent_columns(**matrices: Tensor) -> None:
    """Kernels are told the stride of rows alone.

    Raises:
        ValueError: a matrix whose neighbouring columns don't lie side by side in memory; names it.
    """
    for name, matrix in matrices.items():
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name} has column stride {matrix.stride(1)}: kernels need 1")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _properties(device: torch.device) -> torch.cuda._CudaDeviceProperties:
    return torch.cuda.get_device_properties(device)
