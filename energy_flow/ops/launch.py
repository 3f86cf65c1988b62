"""Launch Triton kernels: the parts that all of them share."""

from typing import Any

import torch
from torch import Tensor

from energy_flow.ops.backend import device_properties


def launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch `num_programs` programs of a kernel on the device of its first argument.

    Args:
        kernel: decorated with `triton.jit`.
        num_programs: with 0 nothing is launched.
        arguments: of the kernel; the first is a tensor.
        constants: `tl.constexpr` arguments, `num_warps` and `num_stages`.
    """
    if num_programs > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(num_programs,)](*arguments, **constants)


def resident_programs(tensor: Tensor, tiles: int, blocks: int, per_multiprocessor: int) -> int:
    """Number of programs per block of columns, for a kernel whose programs loop over tiles of rows.

    All programs are then resident at the same time, so that no program waits for the end of another.

    Args:
        tensor: on the device of the kernel.
        tiles: tiles of rows.
        blocks: blocks of columns.
        per_multiprocessor: programs that are resident on one multiprocessor.

    Returns:
        At most `tiles`.
    """
    # Triton's interpreter runs one program after the other on a CPU.
    multiprocessors = device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
    return min(tiles, -(-per_multiprocessor * multiprocessors // blocks))


def require_adjacent_columns(**matrices: Tensor) -> None:
    """Check matrices for kernels that only get the stride of rows.

    Raises:
        ValueError: the columns of a matrix are not adjacent in memory; names the matrix.
    """
    for name, matrix in matrices.items():
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name} has column stride {matrix.stride(1)}: kernels need 1")
