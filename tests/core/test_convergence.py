"""Early convergence where a share meets its threshold exactly."""

from typing import Any

import pytest
import torch

from energy_flow.core.flow_processor import FlowProcessor
from tests.helpers import Case


def processor_with_moving_cells(case: Case, moving: int) -> FlowProcessor:
    """The first `moving` cells reach a plane in one step; all others carry no energy and stand still for ever."""
    processor = case.processor()
    with torch.no_grad():
        for name, parameter in processor.named_parameters():
            if "bias" in name or name.startswith("map_in"):
                parameter.zero_()
        processor.neuron.network[0].weight[:, :3] = 0.0
        processor.map_in.cell_value[:moving] = 5.0
    return processor


def case_with(threshold: float, num_cells: int, **changes: Any) -> Case:
    lattice = {
        "width": num_cells,
        "height": 1,
        "max_steps": 3,
        "movement.max_displacement": 9.0,
        "convergence.enabled": True,
        "convergence.threshold": threshold,
        "convergence.patience": 9,
        **changes,
    }
    return Case(lattice, displacement=1e6, batch=1)


# 15 of 100 is 0.15, but 0.15 * 100 is more than 15 in float32.
@pytest.mark.parametrize(
    ("reached", "cells", "threshold"), [(15, 100, 0.15), (27, 300, 0.09), (7, 10, 0.7), (2, 2, 1.0)]
)
def test_a_share_that_equals_the_threshold_is_enough(reached: int, cells: int, threshold: float) -> None:
    case = case_with(threshold, cells)
    output = processor_with_moving_cells(case, reached)(case.embedding())
    assert output.by_step["reached"].tolist() == [0, reached, reached, reached]
    assert output.by_step["active"].tolist() == [cells, 0, 0, 0]
    assert (output.landings.steps == 1).all()
    assert int(output.landings.projected.sum()) == cells - reached


def test_one_flow_less_is_not_enough() -> None:
    case = case_with(0.15, 100)
    output = processor_with_moving_cells(case, 14)(case.embedding())
    assert output.by_step["active"].tolist() == [100, 86, 86, 86]
    assert output.landings.steps[0, 14:].tolist() == [3] * 86


def test_not_before_the_minimum_of_steps() -> None:
    case = case_with(0.15, 100, **{"convergence.min_steps": 2})
    output = processor_with_moving_cells(case, 50)(case.embedding())
    assert output.by_step["active"].tolist() == [100, 50, 0, 0]


@pytest.mark.parametrize(("patience", "active"), [(1, [100, 95, 0, 0]), (2, [100, 95, 95, 0])])
def test_patience(patience: int, active: list[int]) -> None:
    case = case_with(0.15, 100, **{"convergence.patience": patience})
    output = processor_with_moving_cells(case, 5)(case.embedding())
    assert output.by_step["active"].tolist() == active
