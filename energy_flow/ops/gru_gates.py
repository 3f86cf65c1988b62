"""The elementwise half of a GRU cell, forward and backward, from its matrix products.

A gate buffer is [N, 4H] with columns [n | r | z | hn], and holds matrix products without biases: n = x W_in^T,
r = x W_ir^T + h W_hr^T, z likewise, hn = h W_hn^T. The bias is [b_in | b_ir + b_hr | b_iz + b_hz | b_hn]. Whatever the
buffer's dtype, arithmetic is done in the bias's, and each result is rounded once, when it is stored.

The products are all that the backward pass needs: computing the gates from them once more takes less time than
writing them down.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton

GatesBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_BLOCK_BYTES = 2**22  # of gates that fit into a core's caches


def gates_forward(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, count: Tensor | None = None) -> None:
    """Next hidden state of a GRU cell (the equations of `torch.nn.GRUCell`) from its matrix products.

    Args:
        gates: [N, 4H] products.
        hidden: [N, H], rows at any stride.
        bias: [4H], float32; float64 for float64 gates.
        out: [N, H], rows at any stride; overwritten by the next hidden state.
        count: int64 scalar: so many leading rows matter. Kernels read no others, and write zeros there. None: all.
    """
    if use_triton(gates):
        from energy_flow.ops import gru_gates_triton  # optional at run time

        gru_gates_triton.gates_forward(gates, hidden, bias, out, count)
    else:
        out.copy_(next_hidden(gates, hidden, bias))


def gates_backward(
    gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor, bias_grad: Tensor, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the products and biases of `gates_forward`, and the direct part of the hidden state's.

    Args:
        gates, hidden, bias: what `gates_forward` got. Kernels overwrite `gates`.
        grad: [N, H], of the next hidden state. Overwritten.
        bias_grad: [4H], the bias's dtype; the sums of the four gradients over rows are added.
        count: see `gates_forward`; `grad` is 0 in the other rows.

    Returns:
        Gradients of the products, [dn | dr | dz | dhn] [N, 4H], from kernels in the memory of `gates`, and what the
        hidden state gets past them, grad * z [N, H], in the memory of `grad`.
    """
    if use_triton(gates):
        from energy_flow.ops import gru_gates_triton  # optional at run time

        gru_gates_triton.gates_backward(gates, hidden, grad, bias, bias_grad, count)
        return gates, grad
    return gates_backward_by(gate_gradients, gates, hidden, grad, bias, bias_grad)


def gates_backward_by(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    gates: Tensor,
    hidden: Tensor,
    grad: Tensor,
    bias: Tensor,
    bias_grad: Tensor,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gates_backward` by `gate_gradients`, or by a compiled form of it; computes all rows."""
    on_gates = function(gates, hidden, grad, bias)
    # A product sums the rows of a row-major matrix twice as fast as `sum` does.
    bias_grad.add_(torch.mm(on_gates.new_ones(1, len(on_gates)), on_gates)[0])
    return on_gates, grad


def gates_backward_in_place(
    backward: GatesBackward,
    gates: Tensor,
    hidden: Tensor,
    grad: Tensor,
    bias: Tensor,
    bias_grad: Tensor,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gates_backward` by `backward`, for all rows, one block after the other, and all results in `gates` and `grad`.

    So a second gate buffer is never needed, and what a block needs is still in the caches when it is copied.
    """
    blocks = max(1, math.ceil(gates.nbytes / _BLOCK_BYTES))
    for own_gates, own_hidden, own_grad in zip(*(value.chunk(blocks) for value in (gates, hidden, grad)), strict=True):
        own_gates.copy_(backward(own_gates, own_hidden, own_grad, bias, bias_grad)[0])
    return gates, grad


def next_hidden(gates: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
    """`gates_forward` as a function of its inputs, [N, H]."""
    new, _, update, _ = _activate(gates, bias)
    return new.lerp_(hidden.to(bias.dtype), update).to(gates.dtype)


def gate_gradients(gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor) -> Tensor:
    """Gradients of the products [N, 4H] as a function of its inputs; `grad` becomes that of the hidden state."""
    hidden, on_out = hidden.to(bias.dtype), grad.to(bias.dtype)
    new, reset, update, hidden_new = _activate(gates, bias)
    rest = 1 - update
    on_update = (hidden - new).mul_(on_out).mul_(update).mul_(rest)
    on_new = rest.mul_(on_out).mul_(new.square_().neg_().add_(1))
    on_hidden_new = on_new * reset
    on_reset = reset.neg_().add_(1).mul_(hidden_new).mul_(on_hidden_new)
    gradients = torch.cat([part.to(gates.dtype) for part in (on_new, on_reset, on_update, on_hidden_new)], dim=1)
    grad.copy_(on_out * update)  # last: in float32 `on_out` is `grad`
    return gradients


def _activate(gates: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New tensors n, r, z, hn in the bias's dtype; the sums with the bias promote to it."""
    products = zip(gates.chunk(4, dim=1), bias.chunk(4), strict=True)
    new, reset, update, hidden_new = (product + own_bias for product, own_bias in products)
    reset = _sigmoid_(reset)
    new = _sigmoid_(new.addcmul_(reset, hidden_new).mul_(2)).mul_(2).sub_(1)  # tanh
    return new, reset, _sigmoid_(update), hidden_new


def _sigmoid_(value: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # an exponential compiles to faster code than a sigmoid
        return value.neg_().exp_().add_(1).reciprocal_()
    return value.sigmoid_()
