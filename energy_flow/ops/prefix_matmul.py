"""Matrix products of as many leading rows as a number on the device says: the host needn't know it."""

from typing import Any

import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton


def mm_leading(left: Tensor, right: Tensor, out: Tensor, count: Tensor | None) -> None:
    """out = left right, in the first `count` rows; what the others hold afterwards is finite where `left` is, or
    what they held before.

    Args:
        left: [N, K], rows at any stride.
        right: [K, M], any strides.
        out: [N, M], rows at any stride.
        count: int64 scalar; None: all rows.
    """
    if count is None or not _saves(left):
        torch.mm(left, right, out=out)
    else:
        _kernels().product(left, right, out, count, add=False)


def addmm_leading(left: Tensor, right: Tensor, total: Tensor, count: Tensor | None) -> None:
    """total += left right, in the first `count` rows. Arguments of `mm_leading`; the other rows of `left` are 0."""
    if count is None or not _saves(left):
        total.addmm_(left, right)
    else:
        _kernels().product(left, right, total, count, add=True)


def _saves(left: Tensor) -> bool:
    """Whether leaving out rows beats the library, which computes all: only where both use matrix units."""
    return use_triton(left) and left.element_size() == 2


def _kernels() -> Any:
    from energy_flow.ops import prefix_matmul_triton as leading_rows_triton  # optional at run time

    return leading_rows_triton
