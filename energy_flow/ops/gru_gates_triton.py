"""Triton kernels of `gru_gates`. They are bound by memory: each number is read once and written once.

They neither wait for the device nor add atomically, so results have the same bits every time, and CUDA graphs can
capture them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of kernels itself.

import torch
import triton
import triton.language as tl
from torch import Tensor

from energy_flow.ops.launch import launch, require_adjacent_columns, resident_programs

_NUM_WARPS = 4
_ACCESS_BYTES = 16  # the widest load or store of a thread
# Columns of H in a tile: whole cache lines, but less than one column per thread. With more, the bias would go through
# shared memory, with barriers.
_BLOCK_H = 64
# Programs of the backward kernel per multiprocessor: its registers allow four.
_RESIDENT = 4


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:  # one instruction; its error of 2^-11 is one rounding of float16, a quarter of one of bfloat16
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return 0.5 + 0.5 * _tanh(0.5 * x, APPROXIMATE)
    else:
        return 1 / (1 + tl.exp(-x))


@triton.jit
def _activate(new, reset, update, hidden_new, bias, columns, mask, H: tl.constexpr, APPROXIMATE: tl.constexpr):
    bias_new = tl.load(bias + columns, mask=mask, other=0)[None, :]
    bias_reset = tl.load(bias + H + columns, mask=mask, other=0)[None, :]
    bias_update = tl.load(bias + 2 * H + columns, mask=mask, other=0)[None, :]
    bias_hidden_new = tl.load(bias + 3 * H + columns, mask=mask, other=0)[None, :]
    reset = _sigmoid(reset + bias_reset, APPROXIMATE)
    update = _sigmoid(update + bias_update, APPROXIMATE)
    hidden_new += bias_hidden_new
    new = _tanh(new + bias_new + reset * hidden_new, APPROXIMATE)
    return new, reset, update, hidden_new


@triton.jit
def _load(gate, mask, H: tl.constexpr, WIDE: tl.constexpr):
    new = tl.load(gate, mask=mask, other=0).to(WIDE)
    reset = tl.load(gate + H, mask=mask, other=0).to(WIDE)
    update = tl.load(gate + 2 * H, mask=mask, other=0).to(WIDE)
    hidden_new = tl.load(gate + 3 * H, mask=mask, other=0).to(WIDE)
    return new, reset, update, hidden_new


@triton.jit
def _store(gate, new, reset, update, hidden_new, mask, H: tl.constexpr):
    tl.store(gate, new, mask=mask)
    tl.store(gate + H, reset, mask=mask)
    tl.store(gate + 2 * H, update, mask=mask)
    tl.store(gate + 3 * H, hidden_new, mask=mask)


@triton.jit
def _mask(rows, num_rows, columns, H: tl.constexpr, BLOCK_H: tl.constexpr):
    mask = (rows < num_rows)[:, None]
    if H % BLOCK_H != 0:
        mask = mask & (columns < H)[None, :]
    return mask


@triton.jit
def _counted(rows, count):
    """Whether rows are below the count on the device; always if there is none."""
    if count is None:
        return (rows >= 0)[:, None]
    else:
        return (rows < tl.load(count))[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    gates,
    hidden,
    bias,
    out,
    count,
    num_rows,
    gates_stride,
    hidden_stride,
    out_stride,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    wide = bias.dtype.element_ty
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    rows = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = _mask(rows, num_rows, columns, H, BLOCK_H)
    present = mask & _counted(rows, count)
    gate = gates + rows[:, None] * gates_stride + columns[None, :]
    state = tl.load(hidden + rows[:, None] * hidden_stride + columns[None, :], mask=present, other=0).to(wide)
    new, reset, update, hidden_new = _load(gate, present, H, wide)
    new, reset, update, hidden_new = _activate(
        new, reset, update, hidden_new, bias, columns, columns < H, H, APPROXIMATE
    )
    next_state = tl.where(present, new + update * (state - new), 0)
    tl.store(out + rows[:, None] * out_stride + columns[None, :], next_state, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    gates,
    hidden,
    grad,
    bias,
    totals,
    count,
    num_rows,
    gates_stride,
    hidden_stride,
    grad_stride,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    wide = bias.dtype.element_ty
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    first = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    total_new = tl.zeros((BLOCK_N, BLOCK_H), dtype=wide)
    total_reset = tl.zeros((BLOCK_N, BLOCK_H), dtype=wide)
    total_update = tl.zeros((BLOCK_N, BLOCK_H), dtype=wide)
    total_hidden_new = tl.zeros((BLOCK_N, BLOCK_H), dtype=wide)
    for tile in range(first, tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0) // blocks):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = _mask(rows, num_rows, columns, H, BLOCK_H)
        present = mask & _counted(rows, count)
        gate = gates + rows[:, None] * gates_stride + columns[None, :]
        grad_out_at = grad + rows[:, None] * grad_stride + columns[None, :]
        state = tl.load(hidden + rows[:, None] * hidden_stride + columns[None, :], mask=present, other=0).to(wide)
        grad_out = tl.load(grad_out_at, mask=present, other=0).to(wide)
        new, reset, update, hidden_new = _load(gate, present, H, wide)
        new, reset, update, hidden_new = _activate(
            new, reset, update, hidden_new, bias, columns, columns < H, H, APPROXIMATE
        )
        # Rows beyond the count and columns beyond the edge have grad_out = 0, so all their gradients are 0.
        grad_new = grad_out * (1 - update) * (1 - new * new)
        grad_update = grad_out * (state - new) * update * (1 - update)
        grad_hidden_new = grad_new * reset
        grad_reset = grad_hidden_new * hidden_new * (1 - reset)
        tl.store(grad_out_at, grad_out * update, mask=mask)
        _store(gate, grad_new, grad_reset, grad_update, grad_hidden_new, mask, H)
        total_new += grad_new
        total_reset += grad_reset
        total_update += grad_update
        total_hidden_new += grad_hidden_new
    total_new, total_reset = tl.sum(total_new, 0), tl.sum(total_reset, 0)
    total_update, total_hidden_new = tl.sum(total_update, 0), tl.sum(total_hidden_new, 0)
    _store(totals + first * 4 * H + columns, total_new, total_reset, total_update, total_hidden_new, columns < H, H)


def gates_forward(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, count: Tensor | None = None) -> None:
    """`gru_gates.gates_forward` with the same arguments; the bias is contiguous."""
    require_adjacent_columns(gates=gates, hidden=hidden, out=out)
    constants, tiles, blocks = _grid(gates, hidden)
    launch(
        _forward_kernel,
        tiles * blocks,
        gates,
        hidden,
        bias,
        out,
        count,
        len(hidden),
        gates.stride(0),
        hidden.stride(0),
        out.stride(0),
        **constants,
    )


def gates_backward(
    gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor, grad_bias: Tensor, count: Tensor | None = None
) -> None:
    """`gru_gates.gates_backward` with the same arguments; results in `gates` and `grad`. The bias is contiguous."""
    require_adjacent_columns(gates=gates, hidden=hidden, grad=grad)
    constants, tiles, blocks = _grid(gates, hidden)
    programs = resident_programs(gates, tiles, blocks, _RESIDENT)
    totals = grad_bias.new_empty(programs, gates.shape[1])
    launch(
        _backward_kernel,
        programs * blocks,
        gates,
        hidden,
        grad,
        bias,
        totals,
        count,
        len(hidden),
        gates.stride(0),
        hidden.stride(0),
        grad.stride(0),
        **constants,
    )
    grad_bias.add_(totals.sum(0))


def _grid(gates: Tensor, hidden: Tensor) -> tuple[dict[str, int], int, int]:
    """Constants of a kernel, tiles of rows, and blocks of columns.

    In one tile, each thread accesses each tensor once, at the full width.
    """
    num_rows, size = hidden.shape
    block_h = min(_BLOCK_H, triton.next_power_of_2(size))
    block_n = max(1, 32 * _NUM_WARPS * _ACCESS_BYTES // gates.element_size() // block_h)
    approximate = gates.is_cuda and gates.element_size() == 2 and torch.version.hip is None
    constants = {"H": size, "BLOCK_N": block_n, "BLOCK_H": block_h, "APPROXIMATE": approximate}
    return constants | {"num_warps": _NUM_WARPS}, triton.cdiv(num_rows, block_n), triton.cdiv(size, block_h)
