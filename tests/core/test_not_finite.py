"""A sample with NaN or Inf is named, and changes no other sample of the batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowOutput
from energy_flow.core.geometry import deposit_cells
from tests.helpers import DIM, Case, tensors_of

NAN = float("nan")
ROUNDING = 1e-12  # float64, numbers of order 1
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "spawn": {"spawn.enabled": True},
    "everything": {
        "spawn.enabled": True,
        "filter.enabled": True,
        "convergence.enabled": True,
        "convergence.threshold": 0.5,
        "noise.std": 0.1,
        "max_steps": 5,
    },
}


def case_with(rules: str, deposit: str) -> Case:
    # An odd number of cells: a NaN as int64 is -2^63, of which an even number sums to 0.
    size = {"width": 3, "height": 3}
    return Case({**RULES[rules], **size, "deposit": deposit}, {"energy_dim": 2}, batch=4, training=True)


def run(case: Case, embedding: Tensor) -> FlowOutput:
    return case.processor()(embedding, case.rows(), record_trajectories=True)


def of_samples(output: FlowOutput, samples: list[int]) -> dict[str, Tensor]:
    """All values of these samples, without slots that have no landing: their entries are meaningless."""
    landings = {name: value[samples] for name, value in tensors_of(output.landings).items()}
    landed = landings[".landed"]
    paths = {name: value[:, samples] for name, value in tensors_of(output.trajectories).items()}
    return {
        **{name: getattr(output, name)[samples] for name in ("embedding", "surface", "input_surface")},
        **{name: value if name == ".landed" else value[landed] for name, value in landings.items()},
        **paths,
        "no_landing": output.faults.no_landing[samples],
        "not_finite": output.faults.not_finite[samples],
    }


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
@pytest.mark.parametrize("entries", [slice(None), slice(2, 3)], ids=["a row", "one number"])
def test_the_other_samples_do_not_change(rules: str, deposit: str, entries: slice) -> None:
    case = case_with(rules, deposit)
    embedding = case.embedding().detach()
    expected = run(case, embedding)
    nonfinite = embedding.clone()
    nonfinite[1, entries] = NAN
    output = run(case, nonfinite)
    assert expected.faults.not_finite.tolist() == [False] * 4
    assert output.faults.not_finite.tolist() == [False, True, False, False]
    others = [0, 2, 3]
    assert_same(of_samples(output, others), of_samples(expected, others))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) == 15
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(actual[name], value), name
            continue
        assert torch.isfinite(value).all(), name
        # Not bit for bit: without ended flows, products have other shapes.
        torch.testing.assert_close(actual[name], value, rtol=0, atol=ROUNDING, msg=name)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
def test_no_flow_of_the_sample_is_lost(rules: str, deposit: str) -> None:
    """The only fault is a nonfinite sample: no flow is lost, and every cell exists."""
    case = case_with(rules, deposit)
    embedding = case.embedding().detach()
    embedding[1] = NAN
    output = run(case, embedding)
    counts = output.by_step
    parts = sum(counts[part] for part in ("active", "reached", "projected", "removed"))
    assert torch.equal(counts["created"], parts)
    assert int(output.faults.lost) == 0
    assert not output.faults.no_landing[1]
    assert output.landings.landed[1, :9].all(), "all flows of its cells"
    assert not output.landings.landed[1, 9:].any(), "a move of unknown length leaves no children"


@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
def test_gradients_of_the_other_samples(deposit: str) -> None:
    """Gradients of the other samples are the same with and without the nonfinite one."""
    case = case_with("spawn", deposit)
    cotangent = torch.randn(4, DIM, dtype=torch.float64)
    cotangent[1] = 0
    found = []
    for value in (0.5, NAN):
        embedding = case.embedding().detach()
        embedding[1] = value
        embedding.requires_grad_()
        output = run(case, embedding)
        found.append(torch.autograd.grad((output.embedding[[0, 2, 3]] * cotangent[[0, 2, 3]]).sum(), embedding)[0])
    others = [0, 2, 3]
    assert (found[0][others] != 0).any(1).all()
    torch.testing.assert_close(found[1][others], found[0][others], rtol=0, atol=ROUNDING)


def test_a_parameter_that_is_not_finite_is_seen_in_every_sample() -> None:
    for name in ("map_in.cell_value", "carrier.energy_head.bias", "carrier.displacement_head.bias"):
        case = Case({"spawn.enabled": True})
        processor = case.processor()
        with torch.no_grad():
            processor.get_parameter(name).view(-1)[0] = NAN
        assert processor(case.embedding()).faults.not_finite.tolist() == [True] * 3, name


def test_a_move_of_unknown_length_leaves_no_children() -> None:
    lattice = Case({"spawn.enabled": True}).processor().lattice
    length = torch.tensor([NAN, 0.0, 0.7, float("inf"), 1e30])  # threshold 0.3, at most 2 children
    assert lattice.num_children(length).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
@pytest.mark.parametrize(("width", "height"), [(4, 3), (1, 2), (1, 1)])
def test_cells_exist_wherever_a_landing_is(value: float, deposit: str, width: int, height: int) -> None:
    for dtype in (torch.float32, torch.float64):
        xy = torch.tensor([[value, 0.3], [0.3, value], [value, value]], dtype=dtype)
        index, _ = deposit_cells(xy, width, height, deposit)
        assert index.dtype == torch.int64
        assert ((index >= 0) & (index < width * height)).all()
