"""Devices and tolerances for the tests of hand-written kernels.

The tests call the public function of an operation, which selects plain torch or Triton. On a CPU it selects plain
torch, or Triton's interpreter if TRITON_INTERPRET is 1. On a CUDA device it selects the compiled kernel.
tests/ops/test_triton_kernels.py runs the tests again in the interpreter.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic, biases and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(dtype: torch.dtype, device: str) -> float:
    """Largest error of a result of order 1 that is computed in the wide dtype and rounded once."""
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return 1e-6
    # Half a unit in the last place. The interpreter truncates to bfloat16 instead of rounding, and compiled kernels
    # approximate tanh to 2^-11.
    rounding = torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5)
    return rounding * 1.01 + (2**-10 if device == "cuda" else 0)
