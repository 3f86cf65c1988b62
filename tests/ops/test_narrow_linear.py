"""The linear map to few outputs, and its gradients, against float64."""

import pytest
import torch
from torch import Tensor

from energy_flow.ops.narrow_linear import narrow_linear, narrow_linear_backward
from tests.ops.kernels import DEVICES, DTYPES, tolerance, wide

SIZES = [(37, 20, 4), (1, 20, 5), (9, 64, 16), (70, 129, 8), (3, 1100, 11)]


def operands(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, and gradient of the result. The hidden states are columns of a matrix of NaN."""
    num, columns, outputs = size
    hidden = torch.full((num, columns + 6), torch.nan, dtype=dtype)
    hidden[:, 3:-3] = torch.randn(num, columns)
    weight = torch.randn(outputs, columns, dtype=wide(dtype))
    bias, grad = torch.randn(outputs, dtype=wide(dtype)), torch.randn(num, outputs, dtype=wide(dtype))
    return hidden.to(device)[:, 3:-3], weight.to(device), bias.to(device), grad.to(device)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_forward(device: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    hidden, weight, bias, _ = operands(size, dtype, device)
    actual = narrow_linear(hidden, weight, bias)
    assert actual.dtype == wide(dtype)
    expected = hidden.double() @ weight.double().t() + bias.double()
    # Nothing is rounded to the dtype of `hidden`. The error of a sum grows with the square root of its length.
    close(actual, expected, tolerance(wide(dtype), device) * size[1] ** 0.5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_backward_adds_to_its_outputs(device: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    hidden, weight, bias, grad = operands(size, dtype, device)
    before = [torch.randn(tensor.shape).to(device, tensor.dtype) for tensor in (hidden, weight, bias)]
    after = [tensor.clone() for tensor in before]
    narrow_linear_backward(grad, hidden, weight, *after)
    exact = grad.double()
    expected = [exact @ weight.double(), exact.t() @ hidden.double(), exact.sum(0)]
    bounds = [
        tolerance(dtype, "cpu") + tolerance(wide(dtype), device) * size[2] ** 0.5,
        *[tolerance(wide(dtype), device) * max(1, size[0] ** 0.5)] * 2,
    ]
    for found, start, added, bound in zip(after, before, expected, bounds, strict=True):
        close(found, start.double() + added, bound)


@pytest.mark.parametrize("device", DEVICES)
def test_backward_is_the_gradient_of_forward(device: str) -> None:
    hidden, weight, bias, grad = operands((7, 20, 5), torch.float64, device)
    leaves = [hidden.clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    expected = torch.autograd.grad(torch.nn.functional.linear(*leaves), leaves, grad)
    found = [torch.zeros_like(leaf) for leaf in leaves]
    with torch.no_grad():
        narrow_linear_backward(grad, hidden, weight, *found)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    hidden, weight, bias, grad = operands((0, 20, 5), torch.float32, device)
    assert narrow_linear(hidden, weight, bias).shape == (0, 5)
    gradients = [torch.zeros_like(tensor) for tensor in (hidden, weight, bias)]
    narrow_linear_backward(grad, hidden, weight, *gradients)
    assert not any(gradient.any() for gradient in gradients)
