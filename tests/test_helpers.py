"""Test the comparisons and the reference with inputs that must fail."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.core.test_against_reference import CASES
from tests.helpers import (
    LATTICE,
    Case,
    assert_near,
    check_case,
    compare_gradients,
    compare_outputs,
    gradients,
    lattice_settings,
    reference_of,
    section,
)
from tests.reference import displacement_scale
from tests.reference_parts import fold, gru_cell

CASE = CASES["spawn with room for all"]


def test_assert_near_refuses() -> None:
    one = torch.ones(2, dtype=torch.float64)
    assert_near(one, one + 1e-11, 1e-10, "same")
    for wrong in (one + 1e-9, one[:1], one * torch.nan, one * torch.inf):
        with pytest.raises(AssertionError, match="it"):
            assert_near(wrong, one, 1e-10, "it")
        if wrong.shape == one.shape:
            with pytest.raises(AssertionError, match="it"):
                assert_near(one, wrong, 1e-10, "it")


def test_section_refuses_unknown_keys() -> None:
    with pytest.raises(KeyError):
        section(LATTICE, {"spawn.treshold": 1.0})
    assert section(LATTICE, {"spawn.threshold": 1.0})["spawn"]["threshold"] == 1.0
    assert LATTICE["spawn"]["threshold"] != 1.0


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("landings", "landed"),
        ("landings", "projected"),
        ("landings", "xy"),
        ("landings", "plane"),
        ("landings", "distance"),
        ("landings", "steps"),
        ("landings", "energy"),
        ("trajectories", "position"),
        ("trajectories", "active"),
        ("trajectories", "displacement"),
    ],
)
def test_compare_outputs_finds_one_wrong_slot(part: str, field: str) -> None:
    actual, expected = check_case(CASE)
    compare_outputs(actual, expected)
    inner = getattr(actual, part)
    sample, flow = next(iter(expected.landings()))
    wrong = change_at(getattr(inner, field), -1 if part == "trajectories" else None, sample, flow.slot)
    changed = dataclasses.replace(actual, **{part: dataclasses.replace(inner, **{field: wrong})})
    with pytest.raises(AssertionError):
        compare_outputs(changed, expected)


def change_at(value: Tensor, step: int | None, sample: int, slot: int) -> Tensor:
    changed = value.detach().clone()
    entry = changed[sample, slot] if step is None else changed[step, sample, slot]
    entry.copy_(~entry if entry.dtype == torch.bool else entry + 1)
    return changed


@pytest.mark.parametrize("key", ["created", "active", "reached", "removed"])
def test_compare_outputs_finds_a_wrong_count(key: str) -> None:
    actual, expected = check_case(CASE)
    counts = actual.by_step[key].clone()
    counts[-1] += 1
    with pytest.raises(AssertionError, match=key):
        compare_outputs(dataclasses.replace(actual, by_step={**actual.by_step, key: counts}), expected)


@pytest.mark.parametrize("key", ["share_z0", "steps", "coverage", "displacement", "energy_std"])
def test_compare_outputs_finds_a_wrong_statistic(key: str) -> None:
    actual, expected = check_case(CASE)
    wrong = {**actual.statistics, key: actual.statistics[key] + 1e-3}
    with pytest.raises(AssertionError, match=key):
        compare_outputs(dataclasses.replace(actual, statistics=wrong), expected)


@pytest.mark.parametrize("field", ["embedding", "surface"])
def test_compare_outputs_finds_a_wrong_result(field: str) -> None:
    actual, expected = check_case(CASE)
    wrong = getattr(actual, field).detach().clone()
    wrong.view(-1)[3] += 1e-8
    with pytest.raises(AssertionError, match=field):
        compare_outputs(dataclasses.replace(actual, **{field: wrong}), expected)


def test_compare_gradients_finds_one_wrong_entry() -> None:
    processor, embedding = CASE.processor(), CASE.embedding()
    found = gradients(processor, embedding, processor(embedding))
    compare_gradients(found, found)
    for name in found:
        wrong = {key: value.clone() for key, value in found.items()}
        wrong[name].view(-1)[0] += 1e-6
        with pytest.raises(AssertionError, match=name):
            compare_gradients(wrong, found)


def test_check_case_refuses_missing_events() -> None:
    with pytest.raises(AssertionError, match="spawned did not happen"):
        check_case(Case(expect=("spawned",)))
    with pytest.raises(AssertionError, match="projected happened"):
        check_case(Case(absent=("projected",)))


def test_check_case_refuses_decisions_on_a_threshold() -> None:
    """A flow moves by exactly the threshold of the filter, so rounding decides."""
    weak = Case(displacement=0.2)
    lengths = reference_of(weak, weak.processor(), weak.embedding(), weak.rows()).lengths
    edge = dataclasses.replace(weak, lattice={"filter.enabled": True, "filter.min_displacement": lengths[0]})
    with pytest.raises(AssertionError, match="filter came within"):
        check_case(edge)


def test_reference_depends_on_every_parameter() -> None:
    """Without this, equal gradients would show nothing."""
    processor, embedding = CASE.processor(), CASE.embedding()
    found = gradients(processor, embedding, reference_of(CASE, processor, embedding, CASE.rows()))
    assert all((gradient != 0).any() for gradient in found.values())


@pytest.mark.parametrize(
    ("x", "expected"), [(0.3, 0.3), (1.0, 1.0), (1.25, 0.75), (-1.25, -0.75), (3.5, -0.5), (-3.5, 0.5), (5.25, 0.75)]
)
def test_reference_fold(x: float, expected: float) -> None:
    assert fold(x) == expected


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.5), (1, 1.0), (2, 1.5), (3, 2.0), (4, 2.0 * 0.85), (8, 2.0 * 0.4), (50, 2.0 * 0.4)]
)
def test_reference_schedule(step: int, expected: float) -> None:
    # Warm-up over 3 steps from scale / 4, then from 2 down to 0.4 of it over 4 steps.
    changes = {"scale": 2.0, "warmup_steps": 3, "decay_steps": 4, "final_scale": 0.4, "max_displacement": 1.0}
    movement = lattice_settings(movement=changes).movement
    assert displacement_scale(movement, step) == pytest.approx(expected)


def test_reference_gru_cell() -> None:
    cell = torch.nn.GRUCell(3, 4, dtype=torch.float64)
    inputs, hidden = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(gru_cell(cell, inputs, hidden), cell(inputs, hidden), rtol=0, atol=1e-14)
