"""Cells, reflection and deposit weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from energy_flow.core.flow_step import fold
from energy_flow.core.geometry import cell_centres, deposit_cells
from tests import reference_parts

DTYPE = torch.float64
CPU = torch.device("cpu")
COORDINATES = st.floats(-50, 50, allow_nan=False)
INSIDE = st.floats(-1, 1, allow_nan=False)
SIZES = st.integers(1, 6)


@given(SIZES, SIZES)
def test_cell_centres(width: int, height: int) -> None:
    centres = cell_centres(width, height, DTYPE, CPU)
    assert centres.shape == (width * height, 2)
    for y in range(height):
        for x in range(width):
            expected = [2 * x / (width - 1) - 1 if width > 1 else 0, 2 * y / (height - 1) - 1 if height > 1 else 0]
            assert centres[y * width + x].tolist() == pytest.approx(expected, abs=1e-15)


@given(INSIDE)
def test_fold_leaves_values_inside_alone(x: float) -> None:
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(x, dtype=dtype)
        assert torch.equal(fold(value), value)


@given(COORDINATES)
def test_fold_ends_inside_as_one_reflection_at_a_time(x: float) -> None:
    folded = fold(torch.tensor(x, dtype=DTYPE)).item()
    assert -1 <= folded <= 1
    assert folded == pytest.approx(reference_parts.fold(x), abs=1e-13)
    assert -1 <= fold(torch.tensor(x, dtype=torch.float32)).item() <= 1


@given(COORDINATES, st.integers(-5, 5))
def test_fold_has_period_4(x: float, periods: int) -> None:
    first, second = fold(torch.tensor([x, x + 4 * periods], dtype=DTYPE)).tolist()
    assert first == pytest.approx(second, abs=1e-13)


@given(COORDINATES)
def test_fold_has_slope_of_one(x: float) -> None:
    crossings = math.floor((x + 1) / 2)
    if abs((x + 1) / 2 - round((x + 1) / 2)) < 1e-9:
        return
    value = torch.tensor(x, dtype=DTYPE, requires_grad=True)
    fold(value).backward()
    assert value.grad is not None
    assert value.grad.item() == (1 if crossings % 2 == 0 else -1)


@given(st.lists(st.tuples(INSIDE, INSIDE), min_size=1, max_size=5), SIZES, SIZES)
def test_bilinear_weights_keep_the_place(points: list[tuple[float, float]], width: int, height: int) -> None:
    xy = torch.tensor(points, dtype=DTYPE)
    index, weight = deposit_cells(xy, width, height, "bilinear")
    assert index.shape == weight.shape
    assert index.dtype == torch.int64
    assert ((index >= 0) & (index < width * height)).all()
    assert (weight >= -1e-15).all()
    torch.testing.assert_close(weight.sum(-1), torch.ones(len(points), dtype=DTYPE), rtol=0, atol=1e-14)
    # The weighted mean of the cells is the place itself (0 along an axis of one cell).
    mean = (weight[..., None] * cell_centres(width, height, DTYPE, CPU)[index]).sum(-2)
    expected = xy * torch.tensor([width > 1, height > 1])
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-13)


@given(INSIDE, INSIDE, SIZES, SIZES)
def test_nearest_is_the_nearest_cell(x: float, y: float, width: int, height: int) -> None:
    xy = torch.tensor([[x, y]], dtype=DTYPE)
    index, weight = deposit_cells(xy, width, height, "nearest")
    assert index.shape == (1, 1)
    assert weight.tolist() == [[1.0]]
    distances = (cell_centres(width, height, DTYPE, CPU) - xy * torch.tensor([width > 1, height > 1])).abs().amax(-1)
    spacing = torch.tensor([2 / max(1, width - 1), 2 / max(1, height - 1)])
    offset = (
        cell_centres(width, height, DTYPE, CPU)[index[0, 0]] - xy[0] * torch.tensor([width > 1, height > 1])
    ).abs()
    assert (offset <= spacing / 2 + 1e-12).all()
    assert distances[index[0, 0]] <= spacing.max() / 2 + 1e-12


@pytest.mark.parametrize(("width", "height"), [(5, 4), (2, 2), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("deposit", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_cell_takes_the_border_wholly(width: int, height: int, deposit: str, dtype: torch.dtype) -> None:
    index, weight = deposit_cells(torch.ones(1, 2, dtype=dtype), width, height, deposit)
    share = torch.zeros(width * height, dtype=dtype).index_add(0, index[0], weight[0])
    expected = torch.zeros(width * height, dtype=dtype)
    expected[-1] = 1
    assert torch.equal(share, expected)


@pytest.mark.parametrize(("width", "height"), [(5, 4), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("deposit", ["nearest", "bilinear"])
def test_a_centre_belongs_to_its_cell(width: int, height: int, deposit: str) -> None:
    centres = cell_centres(width, height, DTYPE, CPU)
    index, weight = deposit_cells(centres, width, height, deposit)
    share = torch.zeros(width * height, width * height, dtype=DTYPE).scatter_add(1, index, weight)
    torch.testing.assert_close(share, torch.eye(width * height, dtype=DTYPE), rtol=0, atol=1e-14)


def test_ties_of_nearest_go_up() -> None:
    # Half way between the cells of a row of 3: floor(g + 1/2).
    index, _ = deposit_cells(torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=DTYPE), 3, 1, "nearest")
    assert index.tolist() == [[1], [2]]


def test_x_and_y_get_gradients_from_bilinear_weights_only() -> None:
    xy = torch.tensor([[0.3, -0.4]], dtype=DTYPE, requires_grad=True)
    _, weight = deposit_cells(xy, 4, 5, "bilinear")
    (gradient,) = torch.autograd.grad((weight * torch.tensor([1.0, 2.0, 5.0, 7.0])).sum(), xy)
    assert (gradient != 0).all()
    assert not deposit_cells(xy, 4, 5, "nearest")[1].requires_grad
