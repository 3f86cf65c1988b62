"""Triton kernels of `heads`: too few outputs for matrix units, so that reading the memory is all that takes time.

Nothing waits for the device, nothing is added atomically: the same bits every time, and fit for CUDA graphs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads annotations of kernels itself.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from energy_flow.ops.backend import num_multiprocessors, require_adjacent_columns

# One warp per program: sums over H stay in a warp, sums over rows in a thread, and none needs shared memory.
_NUM_WARPS = 1
_WARP_BYTES = 32 * 16  # that a warp loads at once
_FORWARD_ACCESSES = 8  # per thread; 64 numbers of two bytes
_LARGEST_BLOCK = 1024
# Backward programs per multiprocessor: as many as its registers allow. More would also leave more partial sums.
_RESIDENT = 8


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    memory,
    weight,
    bias,
    out,
    num_rows,
    memory_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wide = weight.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    outputs = tl.arange(0, PADDED_K)
    result = tl.zeros((BLOCK_N, PADDED_K), dtype=wide)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        mask = (rows < num_rows)[:, None] & (columns < H)[None, :]
        state = tl.load(memory + rows[:, None] * memory_stride + columns[None, :], mask=mask, other=0).to(wide)
        for k in tl.static_range(K):
            own_weight = tl.load(weight + k * H + columns, mask=columns < H, other=0)
            part = tl.sum(state * own_weight[None, :], 1)
            result += tl.where(outputs[None, :] == k, part[:, None], 0)
    result += tl.load(bias + outputs, mask=outputs < K, other=0)[None, :]
    mask = (rows < num_rows)[:, None] & (outputs < K)[None, :]
    tl.store(out + rows[:, None] * K + outputs[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad,
    memory,
    weight,
    grad_memory,
    totals,
    num_rows,
    grad_stride,
    memory_stride,
    grad_memory_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wide = weight.dtype.element_ty
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    first = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    outputs = tl.arange(0, PADDED_K)
    total = tl.zeros((PADDED_K, BLOCK_H), dtype=wide)
    for tile in range(first, tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0) // blocks):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (columns < H)[None, :]
        state = tl.load(memory + rows[:, None] * memory_stride + columns[None, :], mask=mask, other=0).to(wide)
        on_state_at = grad_memory + rows[:, None] * grad_memory_stride + columns[None, :]
        on_state = tl.load(on_state_at, mask=mask, other=0).to(wide)
        for k in tl.static_range(K):
            own_weight = tl.load(weight + k * H + columns, mask=columns < H, other=0)
            own_grad = tl.load(grad + rows * grad_stride + k, mask=rows < num_rows, other=0)
            on_state += own_grad[:, None] * own_weight[None, :]
            part = tl.sum(own_grad[:, None] * state, 0)
            total += tl.where(outputs[:, None] == k, part[None, :], 0)
        tl.store(on_state_at, on_state, mask=mask)
    mask = (outputs < K)[:, None] & (columns < H)[None, :]
    tl.store(totals + (first * K + outputs[:, None]) * H + columns[None, :], total, mask=mask)


def heads_forward(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`heads.heads_forward`, same arguments; weight and bias contiguous."""
    require_adjacent_columns(memory=memory)
    (num_rows, size), num_outputs = memory.shape, weight.shape[0]
    out = weight.new_empty(num_rows, num_outputs)
    block_h = min(_LARGEST_BLOCK, triton.next_power_of_2(size))
    block_n = max(1, _FORWARD_ACCESSES * _WARP_BYTES // memory.element_size() // block_h)
    with torch.cuda.device_of(memory):
        _forward_kernel[(triton.cdiv(num_rows, block_n),)](
            memory,
            weight,
            bias,
            out,
            num_rows,
            memory.stride(0),
            H=size,
            K=num_outputs,
            PADDED_K=triton.next_power_of_2(num_outputs),
            BLOCK_N=block_n,
            BLOCK_H=block_h,
            num_warps=_NUM_WARPS,
        )
    return out


def heads_backward(
    grad: Tensor, memory: Tensor, weight: Tensor, grad_memory: Tensor, weight_grad: Tensor, bias_grad: Tensor
) -> None:
    """`heads.heads_backward`, same arguments; weight contiguous."""
    require_adjacent_columns(grad=grad, memory=memory, grad_memory=grad_memory)
    (num_rows, size), num_outputs = memory.shape, weight.shape[0]
    block_h = min(_WARP_BYTES // memory.element_size(), triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block_h)
    # A thread holds K sums for each of its columns: with many of them it has registers for few rows.
    block_n = 4 if num_outputs <= 8 else 2
    programs = min(triton.cdiv(num_rows, block_n), triton.cdiv(_RESIDENT * num_multiprocessors(memory), blocks))
    totals = weight_grad.new_empty(programs, num_outputs, size)
    with torch.cuda.device_of(memory):
        _backward_kernel[(programs * blocks,)](
            grad,
            memory,
            weight,
            grad_memory,
            totals,
            num_rows,
            grad.stride(0),
            memory.stride(0),
            grad_memory.stride(0),
            H=size,
            K=num_outputs,
            PADDED_K=triton.next_power_of_2(num_outputs),
            BLOCK_N=block_n,
            BLOCK_H=block_h,
            num_warps=_NUM_WARPS,
        )
    weight_grad.add_(totals.sum(0))
    bias_grad.add_(grad.sum(0))
