"""A linear map to very few outputs, in full precision from a memory of less."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from energy_flow.ops.backend import use_triton


def heads_forward(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """memory W^T + bias, multiplied and summed in the weight's dtype.

    Args:
        memory: [N, H], rows at any stride.
        weight: [K, H], float32; float64 for a float64 memory. K is small: kernels are written for up to 16.
        bias: [K], the weight's dtype.

    Returns:
        [N, K], the weight's dtype.
    """
    if use_triton(memory):
        from energy_flow.ops import narrow_linear_triton as heads_triton  # optional at run time

        return heads_triton.heads_forward(memory, weight, bias)
    return heads_forward_torch(memory, weight, bias)


def heads_backward(
    grad: Tensor, memory: Tensor, weight: Tensor, grad_memory: Tensor, weight_grad: Tensor, bias_grad: Tensor
) -> None:
    """Adds the gradients of `heads_forward` to those that its arguments have.

    Args:
        grad: [N, K], of the result.
        memory, weight: what `heads_forward` got.
        grad_memory: [N, H], the memory's dtype; grad W is added, with one rounding.
        weight_grad: [K, H], the weight's dtype; grad^T memory is added.
        bias_grad: [K], the weight's dtype; the sum of grad over rows is added.
    """
    if use_triton(memory):
        from energy_flow.ops import narrow_linear_triton as heads_triton  # optional at run time

        heads_triton.heads_backward(grad, memory, weight, grad_memory, weight_grad, bias_grad)
    else:
        heads_backward_torch(grad, memory, weight, grad_memory, weight_grad, bias_grad)


def heads_forward_torch(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`heads_forward` in plain torch, on any device."""
    if torch.compiler.is_compiling() and memory.dtype != weight.dtype:
        # One loop over the memory; a product would ask for a copy of it in the weight's dtype.
        return (memory.to(weight.dtype)[:, None] * weight).sum(-1) + bias
    return functional.linear(memory.to(weight.dtype), weight, bias)


def heads_backward_torch(
    grad: Tensor, memory: Tensor, weight: Tensor, grad_memory: Tensor, weight_grad: Tensor, bias_grad: Tensor
) -> None:
    """`heads_backward` in plain torch, on any device."""
    heads_backward_by(add_product, grad, memory, weight, grad_memory, weight_grad, bias_grad)


def heads_backward_by(
    add: Callable[[Tensor, Tensor, Tensor], None],
    grad: Tensor,
    memory: Tensor,
    weight: Tensor,
    grad_memory: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
) -> None:
    """`heads_backward` by `add_product`, or by a compiled form of it."""
    if grad_memory.dtype == grad.dtype:
        grad_memory.addmm_(grad, weight)
    else:
        add(grad_memory, grad, weight)
    weight_grad.addmm_(grad.t(), memory.to(weight.dtype))
    bias_grad.add_(grad.sum(0))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [N, H] += left [N, K] right [K, H], both of more precision than the total, with one rounding."""
    if torch.compiler.is_compiling():  # one loop over the total
        total.copy_(total + sum(column[:, None] * row for column, row in zip(left.unbind(1), right, strict=True)))
    else:
        total.add_(left @ right)
