"""The elementwise half of a GRU cell against `torch.nn.GRUCell`, and against autograd in float64."""

import pytest
import torch
from torch import Tensor

from energy_flow.ops.gru_gates import gates_backward, gates_forward
from tests.ops.kernels import DEVICES, DTYPES, HALVES, tolerance, wide

SIZES = [(37, 20), (1, 20), (9, 64), (70, 129), (3, 1)]
INPUT_SIZE = 5


def strided(values: Tensor, padding: int = 3) -> Tensor:
    """The same values as columns of a wider matrix whose other columns are NaN."""
    wider = values.new_full((values.shape[0], values.shape[1] + 2 * padding), torch.nan)
    wider[:, padding:-padding] = values
    return wider[:, padding:-padding]


def operands(num: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products, hidden state, bias, gradient of the result."""
    draws = [torch.randn(shape, dtype=torch.float64) for shape in ((num, 4 * size), (num, size), (4 * size,))]
    gates, hidden, bias = draws
    grad = torch.randn(num, size, dtype=torch.float64)
    gates, hidden, grad = (tensor.to(device, dtype) for tensor in (gates, hidden, grad))
    return gates, strided(hidden), bias.to(device, wide(dtype)), grad


def formula(gates: Tensor, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Next hidden state and activated gates, out of place."""
    products, biases = gates.chunk(4, dim=1), bias.chunk(4)
    reset = torch.sigmoid(products[1] + biases[1])
    update = torch.sigmoid(products[2] + biases[2])
    hidden_new = products[3] + biases[3]
    new = torch.tanh(products[0] + biases[0] + reset * hidden_new)
    return (1 - update) * new + update * hidden, torch.cat([new, reset, update, hidden_new], dim=1)


def forward(gates: Tensor, hidden: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """`gates_forward` into a poisoned view; (next hidden state, what the gates are then)."""
    gates, out = gates.clone(), strided(torch.full_like(hidden, torch.nan))
    around = out._base
    assert around is not None
    gates_forward(gates, hidden, bias, out, keep)
    assert around[:, :3].isnan().all()
    assert around[:, -3:].isnan().all()
    return out, gates


def backward(
    gates: Tensor, hidden: Tensor, bias: Tensor, grad: Tensor, activated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`gates_backward` on copies; gradients of the products, of the bias, and of the hidden state past the products."""
    gates, grad, bias_grad = gates.clone(), grad.clone(), torch.zeros_like(bias)
    gates_backward(gates, hidden, grad, bias, bias_grad, activated)
    return gates, bias_grad, grad


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_with_its_products_it_is_torchs_cell(device: str, dtype: torch.dtype, activated: bool) -> None:
    num, size = 37, 20
    cell = torch.nn.GRUCell(INPUT_SIZE, size, dtype=torch.float64)
    inputs = torch.randn(num, INPUT_SIZE, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(num, size, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(num, size, dtype=torch.float64)
    expected = cell(inputs, hidden)
    leaves = [inputs, hidden, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    theirs = torch.autograd.grad((expected * cotangent).sum(), leaves)

    x, h, w_input, w_hidden, b_input, b_hidden = (leaf.detach().to(device, dtype) for leaf in leaves)
    (ir, iz, in_), (hr, hz, hn) = (x @ w_input.t()).chunk(3, 1), (h @ w_hidden.t()).chunk(3, 1)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = b_input.chunk(3), b_hidden.chunk(3)
    bias = torch.cat([b_in, b_ir + b_hr, b_iz + b_hz, b_hn])
    out, gates = forward(torch.cat([in_, ir + hr, iz + hz, hn], dim=1), strided(h), bias, keep=activated)
    on_gates, on_bias, on_hidden = backward(gates, strided(h), bias, cotangent.to(device, dtype), activated)

    on_new, on_reset, on_update, on_hidden_new = on_gates.chunk(4, dim=1)
    on_input_products = torch.cat([on_reset, on_update, on_new], dim=1)
    on_hidden_products = torch.cat([on_reset, on_update, on_hidden_new], dim=1)
    b_new, b_reset, b_update, b_hidden_new = on_bias.chunk(4)
    mine = [
        on_input_products @ w_input,
        on_hidden + on_hidden_products @ w_hidden,
        on_input_products.t() @ x,
        on_hidden_products.t() @ h,
        torch.cat([b_reset, b_update, b_new]),
        torch.cat([b_reset, b_update, b_hidden_new]),
    ]
    bound = tolerance(dtype, device)
    close(out.cpu(), expected.detach(), bound)
    for actual, wanted in zip(mine, theirs, strict=True):
        close(actual.cpu(), wanted, 10 * bound)  # sums of 37 rows or 60 columns


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_forward(device: str, dtype: torch.dtype, keep: bool, size: tuple[int, int]) -> None:
    gates, hidden, bias, _ = operands(*size, dtype, device)
    expected, expected_gates = formula(gates.double(), hidden.double(), bias.double())
    out, kept = forward(gates, hidden, bias, keep)
    assert out.dtype == kept.dtype == dtype
    close(out, expected, tolerance(dtype, device))
    if keep:
        close(kept, expected_gates, tolerance(dtype, device))
    else:
        assert torch.equal(kept, gates)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_backward_from_products(device: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    gates, hidden, bias, grad = operands(*size, dtype, device)
    leaves = [tensor.double().clone().requires_grad_() for tensor in (gates, hidden, bias)]
    out, _ = formula(*leaves)
    on_gates, on_hidden, on_bias = torch.autograd.grad(out, leaves, grad.double())
    mine, my_bias, my_hidden = backward(gates, hidden, bias, grad, activated=False)
    bound = 4 * tolerance(dtype, device)  # gradients of up to 3, products of several factors
    close(mine, on_gates, bound)
    close(my_hidden, on_hidden, bound)
    # Sums of unrounded numbers: as good as float32, however coarse the gates are. Approximate tanhs add up.
    approximate = device == "cuda" and dtype in HALVES
    bound = size[0] * (2**-10 if approximate else tolerance(wide(dtype), device))
    close(my_bias, on_bias, bound)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_backward_from_activated_gates(device: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """From the rounded gates on it's plain arithmetic, rounded once."""
    gates, hidden, bias, grad = operands(*size, dtype, device)
    _, gates = forward(gates, hidden, bias, keep=True)
    n, r, z, hn = gates.double().chunk(4, dim=1)
    g, h = grad.double(), hidden.double()
    dn = g * (1 - z) * (1 - n * n)
    expected = torch.cat([dn, dn * hn * r * (1 - r), g * (h - n) * z * (1 - z), dn * r], dim=1)
    mine, my_bias, my_hidden = backward(gates, hidden, bias, grad, activated=True)
    close(mine, expected, tolerance(dtype, device))
    close(my_hidden, g * z, tolerance(dtype, device))
    close(my_bias, expected.sum(0), size[0] * tolerance(wide(dtype), device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_recomputed_and_kept_gates_give_the_same_gradients(device: str, dtype: torch.dtype) -> None:
    gates, hidden, bias, grad = operands(37, 20, dtype, device)
    _, kept = forward(gates, hidden, bias, keep=True)
    from_kept = backward(kept, hidden, bias, grad, activated=True)
    from_products = backward(gates, hidden, bias, grad, activated=False)
    for a, b in zip(from_kept[::2], from_products[::2], strict=True):
        close(a, b, 16 * tolerance(dtype, device))  # 1 - n^2 doubles the rounding of n, then it's times 3 times 3


@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_bias_gradients_are_added(device: str, activated: bool) -> None:
    gates, hidden, bias, grad = operands(37, 20, torch.float64, device)
    _, alone, _ = backward(gates, hidden, bias, grad, activated)
    before = torch.randn_like(bias)
    total = before.clone()
    gates_backward(gates, hidden, grad, bias, total, activated)
    close(total, before + alone, 1e-12)
    assert (alone.abs() > 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_saturated_gates_stay_finite(device: str, dtype: torch.dtype) -> None:
    gates = torch.tensor([[1e4], [-1e4]]).expand(2, 12).to(device, dtype)
    hidden, bias = torch.ones(2, 3, dtype=dtype, device=device), torch.zeros(12, dtype=wide(dtype), device=device)
    out, _ = forward(gates, hidden, bias, keep=False)
    close(out, torch.tensor([[1.0], [-1.0]], device=device).expand(2, 3), tolerance(dtype, device))
    for gradient in backward(gates, hidden, bias, torch.ones_like(hidden), activated=False):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    gates, hidden, bias, grad = operands(0, 20, torch.float32, device)
    out, _ = forward(gates, hidden, bias, keep=True)
    assert out.shape == (0, 20)
    assert torch.equal(backward(gates, hidden, bias, grad, activated=True)[1], torch.zeros_like(bias))
