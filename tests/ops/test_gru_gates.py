"""The elementwise part of a GRU cell against `torch.nn.GRUCell` and against autograd in float64."""

import pytest
import torch
from torch import Tensor

from energy_flow.ops import gru_gates
from energy_flow.ops.backend import use_triton
from energy_flow.ops.gru_gates import gate_gradients, gates_backward, gates_forward
from tests.ops.kernels import DEVICES, DTYPES, tolerance, wide

SIZES = [(37, 20), (1, 20), (9, 64), (70, 129), (3, 1)]
INPUT_SIZE = 5


def strided(values: Tensor, padding: int = 3) -> Tensor:
    """The same values as columns of a wider matrix. Its other columns are NaN."""
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


def formula(gates: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
    """The next hidden state as one formula."""
    products, biases = gates.chunk(4, dim=1), bias.chunk(4)
    reset = torch.sigmoid(products[1] + biases[1])
    update = torch.sigmoid(products[2] + biases[2])
    hidden_new = products[3] + biases[3]
    new = torch.tanh(products[0] + biases[0] + reset * hidden_new)
    return (1 - update) * new + update * hidden


def forward(gates: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
    """Call `gates_forward` with a view as `out`, and check that nothing beside it changes."""
    before, out = gates.clone(), strided(torch.full_like(hidden, torch.nan))
    around = out._base
    assert around is not None
    gates_forward(gates, hidden, bias, out)
    assert torch.equal(gates, before)
    assert around[:, :3].isnan().all()
    assert around[:, -3:].isnan().all()
    return out


def backward(gates: Tensor, hidden: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call `gates_backward` on copies. Returns the gradients of products, bias and hidden state (its direct part)."""
    grad_bias = torch.zeros_like(bias)
    grad_gates, grad_hidden = gates_backward(gates.clone(), hidden, grad.clone(), bias, grad_bias)
    return grad_gates, grad_bias, grad_hidden


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_products_and_gates_equal_torchs_cell(device: str, dtype: torch.dtype) -> None:
    num, size = 37, 20
    cell = torch.nn.GRUCell(INPUT_SIZE, size, dtype=torch.float64)
    inputs = torch.randn(num, INPUT_SIZE, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(num, size, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(num, size, dtype=torch.float64)
    expected = cell(inputs, hidden)
    leaves = [inputs, hidden, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), leaves)

    x, h, w_input, w_hidden, b_input, b_hidden = (leaf.detach().to(device, dtype) for leaf in leaves)
    (ir, iz, in_), (hr, hz, hn) = (x @ w_input.t()).chunk(3, 1), (h @ w_hidden.t()).chunk(3, 1)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = b_input.chunk(3), b_hidden.chunk(3)
    bias = torch.cat([b_in, b_ir + b_hr, b_iz + b_hz, b_hn])
    gates = torch.cat([in_, ir + hr, iz + hz, hn], dim=1)
    out = forward(gates, strided(h), bias)
    grad_gates, grad_bias, grad_hidden = backward(gates, strided(h), bias, cotangent.to(device, dtype))

    grad_new, grad_reset, grad_update, grad_hidden_new = grad_gates.chunk(4, dim=1)
    grad_input_products = torch.cat([grad_reset, grad_update, grad_new], dim=1)
    grad_hidden_products = torch.cat([grad_reset, grad_update, grad_hidden_new], dim=1)
    b_new, b_reset, b_update, b_hidden_new = grad_bias.chunk(4)
    actual_grads = [
        grad_input_products @ w_input,
        grad_hidden + grad_hidden_products @ w_hidden,
        grad_input_products.t() @ x,
        grad_hidden_products.t() @ h,
        torch.cat([b_reset, b_update, b_new]),
        torch.cat([b_reset, b_update, b_hidden_new]),
    ]
    bound = tolerance(dtype, device)
    close(out.cpu(), expected.detach(), bound)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        close(actual.cpu(), reference, 10 * bound)  # sums over 37 rows or 60 columns


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_forward(device: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    gates, hidden, bias, _ = operands(*size, dtype, device)
    out = forward(gates, hidden, bias)
    assert out.dtype == dtype
    close(out, formula(gates.double(), hidden.double(), bias.double()), tolerance(dtype, device))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_backward(device: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    gates, hidden, bias, grad = operands(*size, dtype, device)
    leaves = [tensor.double().clone().requires_grad_() for tensor in (gates, hidden, bias)]
    grad_gates, grad_hidden, grad_bias = torch.autograd.grad(formula(*leaves), leaves, grad.double())
    actual_grads, actual_bias, actual_hidden = backward(gates, hidden, bias, grad)
    assert actual_grads.dtype == actual_hidden.dtype == dtype
    bound = 4 * tolerance(dtype, device)  # gradients are up to 3, and products of several factors
    close(actual_grads, grad_gates, bound)
    close(actual_hidden, grad_hidden, bound)
    # Plain torch sums rounded numbers and rounds the sum. In kernels, errors of approximate tanhs add up.
    close(actual_bias, grad_bias, size[0] * bound)


@pytest.mark.parametrize("share", [0, 0.4, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_a_count_have_no_effect(
    device: str, dtype: torch.dtype, size: tuple[int, int], share: float
) -> None:
    gates, hidden, bias, grad = operands(*size, dtype, device)
    used = int(share * size[0])
    grad[used:] = 0
    expected, (expected_gates, expected_bias, expected_hidden_grad) = (
        forward(gates, hidden, bias),
        backward(gates, hidden, bias, grad),
    )
    if use_triton(gates):  # kernels don't read these rows
        gates[used:], hidden[used:] = torch.nan, torch.nan
        expected[used:] = 0
    count, out, grad_bias = torch.tensor(used, device=device), torch.empty_like(hidden), torch.zeros_like(bias)
    gates_forward(gates, hidden, bias, out, count)
    actual_grads, actual_hidden = gates_backward(gates, hidden, grad, bias, grad_bias, count)
    for actual, reference in (
        (out, expected),
        (actual_grads, expected_gates),
        (actual_hidden, expected_hidden_grad),
        (grad_bias, expected_bias),
    ):
        assert torch.equal(actual, reference)
    assert (actual_grads[used:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_bias_gradients_are_added(device: str) -> None:
    gates, hidden, bias, grad = operands(37, 20, torch.float64, device)
    _, alone, _ = backward(gates, hidden, bias, grad)
    before = torch.randn_like(bias)
    total = before.clone()
    gates_backward(gates, hidden, grad, bias, total)
    close(total, before + alone, 1e-12)
    assert (alone.abs() > 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_saturated_gates_stay_finite(device: str, dtype: torch.dtype) -> None:
    gates = torch.tensor([[1e4], [-1e4]]).repeat(1, 12).to(device, dtype)
    hidden, bias = torch.ones(2, 3, dtype=dtype, device=device), torch.zeros(12, dtype=wide(dtype), device=device)
    out = forward(gates, hidden, bias)
    close(out, torch.tensor([[1.0], [-1.0]], device=device).expand(2, 3), tolerance(dtype, device))
    for gradient in backward(gates, hidden, bias, torch.ones_like(hidden)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    gates, hidden, bias, grad = operands(0, 20, torch.float32, device)
    assert forward(gates, hidden, bias).shape == (0, 20)
    assert torch.equal(backward(gates, hidden, bias, grad)[1], torch.zeros_like(bias))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_kernel_argument_and_in_place(in_place: bool, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the values of `gate_gradients`. `in_place` writes them over `gates`."""
    gates, hidden, bias, grad = operands(37, 20, torch.float32, "cpu")
    calls: list[int] = []

    def kernel(*arguments: Tensor) -> Tensor:
        calls.append(len(arguments[0]))
        return gate_gradients(*arguments)

    direct, expected_hidden = grad.clone(), grad.clone()
    expected = gate_gradients(gates, hidden, expected_hidden, bias)
    monkeypatch.setattr(gru_gates, "_BLOCK_BYTES", gates.nbytes // blocks)
    grad_bias = torch.zeros_like(bias)
    found, found_hidden = gates_backward(gates, hidden, direct, bias, grad_bias, kernel=kernel, in_place=in_place)
    assert calls == ([37] if blocks == 1 or not in_place else [10, 10, 10, 7])
    close(found, expected, 1e-6)
    close(found_hidden, expected_hidden, 1e-6)
    assert found_hidden is direct
    assert (found is gates) == in_place
    close(grad_bias, expected.double().sum(0), 1e-5)
