"""Matrix products of the leading rows only. Their number is on the device, so the host doesn't wait for it.

N rows, K columns of the left matrix, M columns of the right matrix
"""

from typing import Any

import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton


def prefix_mm(left: Tensor, right: Tensor, out: Tensor, count: Tensor | None) -> None:
    """out = left right in the first `count` rows.

    The other rows of `out` either keep their values, or become finite if `left` is finite.

    Args:
        left: [N, K], rows at any stride.
        right: [K, M], any strides.
        out: [N, M], rows at any stride.
        count: int64 scalar. None: all rows.
    """
    if count is None or not _saves_time(left):
        torch.mm(left, right, out=out)
    else:
        _kernels().product(left, right, out, count, add=False)


def prefix_addmm(left: Tensor, right: Tensor, total: Tensor, count: Tensor | None) -> None:
    """total += left right in the first `count` rows. Arguments as in `prefix_mm`; `left` is 0 in the other rows."""
    if count is None or not _saves_time(left):
        total.addmm_(left, right)
    else:
        _kernels().product(left, right, total, count, add=True)


def _saves_time(left: Tensor) -> bool:
    """Whether the kernel beats the library, which computes all rows: only if both use matrix units."""
    return use_triton(left) and left.element_size() == 2


def _kernels() -> Any:
    from energy_flow.ops import prefix_matmul_triton  # Triton is optional

    return prefix_matmul_triton
