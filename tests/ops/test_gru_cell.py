"""The GRU cell against `torch.nn.GRUCell`."""

import pytest
import torch
from torch import Tensor

from energy_flow.ops.gru_cell import gru_cell


def cell_and_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.GRUCell, Tensor, Tensor]:
    cell = torch.nn.GRUCell(3, 4, dtype=dtype)
    inputs = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    return cell, inputs, torch.randn(5, 4, dtype=dtype, requires_grad=True)


def parameters(cell: torch.nn.GRUCell) -> list[Tensor]:
    return [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    cell, inputs, hidden = cell_and_inputs(dtype)
    leaves = [inputs, hidden, *parameters(cell)]
    actual, expected = gru_cell(*leaves), cell(inputs, hidden)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    cotangent = torch.randn_like(actual)
    actual_grads = torch.autograd.grad((actual * cotangent).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), leaves)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


def test_gradcheck() -> None:
    cell, inputs, hidden = cell_and_inputs()
    assert torch.autograd.gradcheck(gru_cell, [inputs, hidden, *parameters(cell)])


def test_inputs_are_not_changed() -> None:
    cell, inputs, hidden = cell_and_inputs()
    before = hidden.detach().clone()
    with torch.no_grad():
        gru_cell(inputs, hidden, *parameters(cell))
    assert torch.equal(hidden, before)
