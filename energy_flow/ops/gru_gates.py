"""The elementwise half of a GRU cell, forward and backward, from its matrix products.

A gate buffer is [N, 4H] with columns [n | r | z | hn]. It holds matrix products without biases:

    n = x W_in^T,  r = x W_ir^T + h W_hr^T,  z = x W_iz^T + h W_hz^T,  hn = h W_hn^T

The bias is [b_in | b_ir + b_hr | b_iz + b_hz | b_hn]. Arithmetic runs in the dtype of the bias, whatever the dtype of
the buffer. Each result is rounded once, when it is stored.

The backward pass needs nothing but the products: to compute the gates again is faster than to store and load them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton

GateGradients = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_BLOCK_BYTES = 2**22  # of gates, so that a block fits into a core's caches


def gates_forward(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, count: Tensor | None = None) -> None:
    """Compute the next hidden state of a GRU cell (the equations of `torch.nn.GRUCell`) from its matrix products.

    Args:
        gates: products, [N, 4H].
        hidden: [N, H], rows at any stride.
        bias: [4H], float32; float64 for float64 gates.
        out: [N, H], rows at any stride; overwritten with the next hidden state.
        count: int64 scalar: only so many leading rows are in use. Kernels read no others, and write zeros there.
            None: all rows.
    """
    if use_triton(gates):
        from energy_flow.ops import gru_gates_triton  # Triton is optional

        gru_gates_triton.gates_forward(gates, hidden, bias, out, count)
    else:
        out.copy_(next_hidden(gates, hidden, bias))


def gates_backward(
    gates: Tensor,
    hidden: Tensor,
    grad: Tensor,
    bias: Tensor,
    grad_bias: Tensor,
    count: Tensor | None = None,
    *,
    kernel: GateGradients | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `gates_forward`. The gradient of `hidden` has no part through the products.

    Args:
        gates, hidden, bias: the arguments of `gates_forward`. Triton kernels overwrite `gates`.
        grad: gradient of the next hidden state, [N, H]; overwritten.
        grad_bias: [4H], the dtype of the bias; the sums of the four gradients over rows are added.
        count: see `gates_forward`; `grad` is 0 in the other rows. Only Triton kernels save time with it.
        kernel: a compiled form of `gate_gradients`. None: the Triton kernel if it can run, else `gate_gradients`.
        in_place: overwrite `gates` on every path, one block of rows after the other. Then there is no second gate
            buffer, and a block is still in the caches when it is copied.

    Returns:
        grad_gates: gradients of the products, [dn | dr | dz | dhn], [N, 4H]; in the memory of `gates` if a Triton
            kernel ran or `in_place` is set.
        grad_hidden: the gradient of the hidden state without the part through the products, grad * z, [N, H]; in the
            memory of `grad`.
    """
    if kernel is None and use_triton(gates):
        from energy_flow.ops import gru_gates_triton  # Triton is optional

        gru_gates_triton.gates_backward(gates, hidden, grad, bias, grad_bias, count)
        return gates, grad
    kernel = kernel or gate_gradients
    if not in_place:
        return _block_backward(kernel, gates, hidden, grad, bias, grad_bias), grad
    blocks = max(1, math.ceil(gates.nbytes / _BLOCK_BYTES))
    for own_gates, own_hidden, own_grad in zip(*(value.chunk(blocks) for value in (gates, hidden, grad)), strict=True):
        own_gates.copy_(_block_backward(kernel, own_gates, own_hidden, own_grad, bias, grad_bias))
    return gates, grad


def next_hidden(gates: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
    """`gates_forward` without side effects: returns the next hidden state, [N, H]."""
    new, _, update, _ = _activate(gates, bias)
    return new.lerp_(hidden.to(bias.dtype), update).to(gates.dtype)


def gate_gradients(gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor) -> Tensor:
    """Gradients of the products, [N, 4H]. `grad` is overwritten with the direct part of the hidden state's gradient."""
    hidden, grad_out = hidden.to(bias.dtype), grad.to(bias.dtype)
    new, reset, update, hidden_new = _activate(gates, bias)
    rest = 1 - update
    grad_update = (hidden - new).mul_(grad_out).mul_(update).mul_(rest)
    grad_new = rest.mul_(grad_out).mul_(new.square_().neg_().add_(1))
    grad_hidden_new = grad_new * reset
    grad_reset = reset.neg_().add_(1).mul_(hidden_new).mul_(grad_hidden_new)
    parts = (grad_new, grad_reset, grad_update, grad_hidden_new)
    grad_gates = torch.cat([part.to(gates.dtype) for part in parts], dim=1)
    grad.copy_(grad_out * update)  # last, because in float32 `grad_out` is `grad`
    return grad_gates


def _block_backward(
    kernel: GateGradients, gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor, grad_bias: Tensor
) -> Tensor:
    grad_gates = kernel(gates, hidden, grad, bias)
    # A product sums the rows of a row-major matrix twice as fast as `sum`.
    grad_bias.add_(torch.mm(grad_gates.new_ones(1, len(grad_gates)), grad_gates)[0])
    return grad_gates


def _activate(gates: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New tensors n, r, z, hn in the dtype of the bias: the sums with the bias promote to it."""
    products = zip(gates.chunk(4, dim=1), bias.chunk(4), strict=True)
    new, reset, update, hidden_new = (product + own_bias for product, own_bias in products)
    reset = _sigmoid_(reset)
    new = _sigmoid_(new.addcmul_(reset, hidden_new).mul_(2)).mul_(2).sub_(1)  # tanh
    return new, reset, _sigmoid_(update), hidden_new


def _sigmoid_(value: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # an exponential compiles to faster code than a sigmoid
        return value.neg_().exp_().add_(1).reciprocal_()
    return value.sigmoid_()
