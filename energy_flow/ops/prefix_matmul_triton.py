"""Triton kernel of `prefix_matmul`: a tiled product. Programs of tiles beyond the count end at once.

It neither waits for the device nor adds atomically, so results have the same bits every time, and CUDA graphs can
capture it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of kernels itself.

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from energy_flow.ops.launch import launch, require_adjacent_columns

_BLOCK_N, _BLOCK_M, _BLOCK_K = 128, 256, 64
_NUM_WARPS, _NUM_STAGES = 8, 4
# Shared memory of the tiles in flight: one stage is in use, the others load.
_BYTES = 2 * (_BLOCK_N + _BLOCK_M) * _BLOCK_K * (_NUM_STAGES - 1)


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    left,
    right,
    out,
    count,
    num_rows,
    left_stride,
    right_row_stride,
    right_column_stride,
    out_stride,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
):
    # Columns first, so that programs that run together share rows of `left`, and `right` stays in the cache.
    blocks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    first = tl.program_id(0) // blocks * BLOCK_N
    counted = tl.minimum(tl.load(count), num_rows)
    if first < counted:
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        columns = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        inner = tl.arange(0, BLOCK_K)
        present = (rows < counted)[:, None]
        wanted = (columns < M)[None, :]
        left_at = left + rows[:, None] * left_stride + inner[None, :]
        right_at = right + inner[:, None] * right_row_stride + columns[None, :] * right_column_stride
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                a = tl.load(left_at, mask=present, other=0)
                b = tl.load(right_at, mask=wanted, other=0)
            else:
                a = tl.load(left_at, mask=present & (start + inner < K)[None, :], other=0)
                b = tl.load(right_at, mask=wanted & (start + inner < K)[:, None], other=0)
            total = tl.dot(a, b, total)
            left_at += BLOCK_K
            right_at += BLOCK_K * right_row_stride
        out_at = out + rows[:, None] * out_stride + columns[None, :]
        if ADD:
            total += tl.load(out_at, mask=present & wanted, other=0).to(tl.float32)
        tl.store(out_at, total, mask=present & wanted)


def product(left: Tensor, right: Tensor, out: Tensor, count: Tensor, add: bool) -> None:
    """`prefix_mm`, or `prefix_addmm` with `add`. All matrices have the same dtype of two bytes."""
    require_adjacent_columns(left=left, out=out)
    num_rows, width = left.shape
    columns = right.shape[1]
    widest = _BLOCK_M if _shared_memory(left.device) > _BYTES else _BLOCK_M // 2
    block_m = min(widest, max(16, triton.next_power_of_2(columns)))
    launch(
        _product_kernel,
        triton.cdiv(num_rows, _BLOCK_N) * triton.cdiv(columns, block_m),
        left,
        right,
        out,
        count,
        num_rows,
        left.stride(0),
        *right.stride(),
        out.stride(0),
        M=columns,
        K=width,
        BLOCK_N=_BLOCK_N,
        BLOCK_M=block_m,
        BLOCK_K=_BLOCK_K,
        ADD=add,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )


@functools.cache
def _shared_memory(device: torch.device) -> float:
    """Bytes that a program may use, from the same source as Triton's own check; no limit in the interpreter."""
    if device.type != "cuda":
        return math.inf
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["max_shared_mem"]
