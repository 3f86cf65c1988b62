"""Triton kernels of `narrow_linear`. Outputs are too few for matrix units: the time goes into reading `hidden`.

The kernels neither wait for the device nor add atomically, so results have the same bits every time, and CUDA graphs
can capture them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of kernels itself.

import triton
import triton.language as tl
from torch import Tensor

from energy_flow.ops.launch import launch, require_adjacent_columns, resident_programs

# With one warp per program, sums over H stay in a warp and sums over rows in a thread. None needs shared memory.
_NUM_WARPS = 1
_WARP_BYTES = 32 * 16  # of one load of a warp
_FORWARD_ACCESSES = 8  # per thread; 64 numbers of two bytes
_LARGEST_BLOCK = 1024
# Programs of the backward kernel per multiprocessor: as many as its registers allow.
_RESIDENT = 8


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    hidden,
    weight,
    bias,
    out,
    num_rows,
    hidden_stride,
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
        state = tl.load(hidden + rows[:, None] * hidden_stride + columns[None, :], mask=mask, other=0).to(wide)
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
    hidden,
    weight,
    grad_hidden,
    totals,
    num_rows,
    grad_stride,
    hidden_stride,
    grad_hidden_stride,
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
        state = tl.load(hidden + rows[:, None] * hidden_stride + columns[None, :], mask=mask, other=0).to(wide)
        grad_state_at = grad_hidden + rows[:, None] * grad_hidden_stride + columns[None, :]
        grad_state = tl.load(grad_state_at, mask=mask, other=0).to(wide)
        for k in tl.static_range(K):
            own_weight = tl.load(weight + k * H + columns, mask=columns < H, other=0)
            own_grad = tl.load(grad + rows * grad_stride + k, mask=rows < num_rows, other=0)
            grad_state += own_grad[:, None] * own_weight[None, :]
            part = tl.sum(own_grad[:, None] * state, 0)
            total += tl.where(outputs[:, None] == k, part[None, :], 0)
        tl.store(grad_state_at, grad_state, mask=mask)
    mask = (outputs < K)[:, None] & (columns < H)[None, :]
    tl.store(totals + (first * K + outputs[:, None]) * H + columns[None, :], total, mask=mask)


def narrow_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`narrow_linear.narrow_linear` with the same arguments; weight and bias are contiguous."""
    require_adjacent_columns(hidden=hidden)
    (num_rows, size), num_outputs = hidden.shape, weight.shape[0]
    out = weight.new_empty(num_rows, num_outputs)
    block_h = min(_LARGEST_BLOCK, triton.next_power_of_2(size))
    block_n = max(1, _FORWARD_ACCESSES * _WARP_BYTES // hidden.element_size() // block_h)
    launch(
        _forward_kernel,
        triton.cdiv(num_rows, block_n),
        hidden,
        weight,
        bias,
        out,
        num_rows,
        hidden.stride(0),
        **_constants(weight, block_n, block_h),
    )
    return out


def narrow_linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> None:
    """`narrow_linear.narrow_linear_backward` with the same arguments; the weight is contiguous."""
    require_adjacent_columns(grad=grad, hidden=hidden, grad_hidden=grad_hidden)
    (num_rows, size), num_outputs = hidden.shape, weight.shape[0]
    block_h = min(_WARP_BYTES // hidden.element_size(), triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block_h)
    # A thread holds K sums for each of its columns. With a larger K, its registers hold fewer rows.
    block_n = 4 if num_outputs <= 8 else 2
    programs = resident_programs(hidden, triton.cdiv(num_rows, block_n), blocks, _RESIDENT)
    totals = grad_weight.new_empty(programs, num_outputs, size)
    launch(
        _backward_kernel,
        programs * blocks,
        grad,
        hidden,
        weight,
        grad_hidden,
        totals,
        num_rows,
        grad.stride(0),
        hidden.stride(0),
        grad_hidden.stride(0),
        **_constants(weight, block_n, block_h),
    )
    grad_weight.add_(totals.sum(0))
    grad_bias.add_(grad.sum(0))


def _constants(weight: Tensor, block_n: int, block_h: int) -> dict[str, int]:
    """Constants of a kernel for a weight [K, H]."""
    num_outputs, size = weight.shape
    padded = triton.next_power_of_2(num_outputs)
    blocks = {"BLOCK_N": block_n, "BLOCK_H": block_h}
    return {"H": size, "K": num_outputs, "PADDED_K": padded, "num_warps": _NUM_WARPS} | blocks
