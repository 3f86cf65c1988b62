"""A linear map to very few outputs, from hidden states of low precision to results of full precision.

N rows, H columns of the hidden state, K outputs
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from energy_flow.ops.backend import use_triton

AddProduct = Callable[[Tensor, Tensor, Tensor], None]


def narrow_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """hidden W^T + bias, multiplied and summed in the dtype of the weight.

    Args:
        hidden: [N, H], rows at any stride.
        weight: [K, H], float32; float64 for a float64 `hidden`. The Triton kernel is written for K up to 16.
        bias: [K], the dtype of the weight.

    Returns:
        [N, K], the dtype of the weight.
    """
    if use_triton(hidden):
        from energy_flow.ops import narrow_linear_triton  # Triton is optional

        return narrow_linear_triton.narrow_linear(hidden, weight, bias)
    return narrow_linear_torch(hidden, weight, bias)


def narrow_linear_torch(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`narrow_linear` in plain torch, on any device."""
    if torch.compiler.is_compiling() and hidden.dtype != weight.dtype:
        # This compiles to one loop over `hidden`. A product would need a copy of it in the dtype of the weight.
        return (hidden.to(weight.dtype)[:, None] * weight).sum(-1) + bias
    return functional.linear(hidden.to(weight.dtype), weight, bias)


def narrow_linear_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    *,
    kernel: AddProduct | None = None,
) -> None:
    """Add the gradients of `narrow_linear` to `grad_hidden`, `grad_weight` and `grad_bias`.

    Args:
        grad: gradient of the result, [N, K].
        hidden, weight: the arguments of `narrow_linear`.
        grad_hidden: [N, H], the dtype of `hidden`; grad W is added, with one rounding.
        grad_weight: [K, H], the dtype of the weight; grad^T hidden is added.
        grad_bias: [K], the dtype of the weight; the sum of `grad` over rows is added.
        kernel: a compiled form of `add_product`. None: the Triton kernel if it can run, else `add_product`.
    """
    if kernel is None and use_triton(hidden):
        from energy_flow.ops import narrow_linear_triton  # Triton is optional

        narrow_linear_triton.narrow_linear_backward(grad, hidden, weight, grad_hidden, grad_weight, grad_bias)
        return
    if grad_hidden.dtype == grad.dtype:
        grad_hidden.addmm_(grad, weight)
    else:
        (kernel or add_product)(grad_hidden, grad, weight)
    grad_weight.addmm_(grad.t(), hidden.to(weight.dtype))
    grad_bias.add_(grad.sum(0))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [N, H] += left [N, K] right [K, H], with one rounding to the lower precision of `total`."""
    if torch.compiler.is_compiling():  # compiles to one loop over `total`
        total.copy_(total + sum(column[:, None] * row for column, row in zip(left.unbind(1), right, strict=True)))
    else:
        total.add_(left @ right)
