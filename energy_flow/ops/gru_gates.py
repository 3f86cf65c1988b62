"""The elementwise half of a GRU cell, forward and backward, in the buffer of its matrix products.

A gate buffer is [N, 4H] with columns [n | r | z | hn]. Before its gates are computed it holds matrix products without
biases: n = x W_in^T, r = x W_ir^T + h W_hr^T, z likewise, hn = h W_hn^T. The bias is
[b_in | b_ir + b_hr | b_iz + b_hz | b_hn]. Whatever the buffer's dtype, arithmetic is done in the bias's, and each
result is rounded once, when it is stored.
"""

from torch import Tensor

from energy_flow.ops.backend import use_triton


def gates_forward(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, keep: bool) -> None:
    """Next hidden state of a GRU cell (the equations of `torch.nn.GRUCell`) from its matrix products.

    Args:
        gates: [N, 4H] products; with `keep` overwritten by the activated gates (hn: with its bias), else left alone.
        hidden: [N, H], rows at any stride.
        bias: [4H], float32; float64 for float64 gates.
        out: [N, H], rows at any stride; overwritten by the next hidden state.
        keep: whether the backward pass shall find activated gates.
    """
    if use_triton(gates):
        from energy_flow.ops import gru_gates_triton  # optional at run time

        gru_gates_triton.gates_forward(gates, hidden, bias, out, keep)
    else:
        gates_forward_torch(gates, hidden, bias, out, keep)


def gates_backward(
    gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor, bias_grad: Tensor, activated: bool
) -> None:
    """Gradients of the products and biases of `gates_forward`, and the direct part of the hidden state's.

    Args:
        gates: [N, 4H], activated or still products; overwritten by the gradients [dn | dr | dz | dhn] of the products.
        hidden: [N, H], what `gates_forward` got.
        grad: [N, H], of the next hidden state; overwritten by grad * z, what the hidden state gets past the products.
        bias: [4H], what `gates_forward` got.
        bias_grad: [4H], the bias's dtype; the sums of the four gradients over rows are added, before their rounding.
        activated: whether `gates_forward` was told to keep activated gates; else they are computed again.
    """
    if use_triton(gates):
        from energy_flow.ops import gru_gates_triton  # optional at run time

        gru_gates_triton.gates_backward(gates, hidden, grad, bias, bias_grad, activated)
    else:
        gates_backward_torch(gates, hidden, grad, bias, bias_grad, activated)


def gates_forward_torch(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, keep: bool) -> None:
    """`gates_forward` in plain torch, on any device."""
    new, reset, update, hidden_new = _activate(gates, bias)
    if keep:
        for column, value in zip(gates.chunk(4, dim=1), (new, reset, update, hidden_new), strict=True):
            column.copy_(value)
    out.copy_(new.lerp_(hidden.to(bias.dtype), update))


def gates_backward_torch(
    gates: Tensor, hidden: Tensor, grad: Tensor, bias: Tensor, bias_grad: Tensor, activated: bool
) -> None:
    """`gates_backward` in plain torch, on any device."""
    # `to` may return the very tensor it is given: nothing below writes to these, nor to the gates before the end.
    hidden, on_out = hidden.to(bias.dtype), grad.to(bias.dtype)
    new, reset, update, hidden_new = (
        (gate.to(bias.dtype) for gate in gates.chunk(4, dim=1)) if activated else _activate(gates, bias)
    )
    rest = 1 - update
    on_update = (hidden - new).mul_(on_out).mul_(update).mul_(rest)
    on_new = rest.mul_(on_out).mul_(new.square().neg_().add_(1))
    on_hidden_new = on_new * reset
    on_reset = (1 - reset).mul_(hidden_new).mul_(on_hidden_new)
    grad.mul_(update)
    gradients = (on_new, on_reset, on_update, on_hidden_new)
    for column, total, gradient in zip(gates.chunk(4, dim=1), bias_grad.chunk(4), gradients, strict=True):
        column.copy_(gradient)
        total.add_(gradient.sum(0))


def _activate(gates: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New tensors n, r, z, hn in the bias's dtype; the sums with the bias promote to it."""
    products = zip(gates.chunk(4, dim=1), bias.chunk(4), strict=True)
    new, reset, update, hidden_new = (product + own_bias for product, own_bias in products)
    reset.sigmoid_()
    return new.addcmul_(reset, hidden_new).tanh_(), reset, update.sigmoid_(), hidden_new
