"""Invariants under all settings: conservation, positions, independence of samples, the deposit."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.core.energy_lattice import Landings
from energy_flow.core.flow_processor import FlowOutput
from tests.helpers import DIM, Case, tensors_of

SURFACE_TOLERANCE = 1e-12  # float64; products of other shapes sum in another order
PARTS = ("active", "reached", "projected", "removed")  # the states of created flows
EARLY_ENDS = Case(
    {
        "spawn.enabled": True,
        "filter.enabled": True,
        "filter.min_displacement": 0.2,
        "convergence.enabled": True,
        "convergence.threshold": 0.5,
        "max_steps": 6,
    },
    seed=12,
)


@st.composite
def cases(draw: st.DrawFn, filtered: bool = True) -> Case:
    """Small lattices with any of the rules switched on."""
    width, height = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    lattice: dict[str, Any] = {
        "width": width,
        "height": height,
        "depth": draw(st.integers(1, 8)),
        "max_flows_per_sample": draw(st.sampled_from([None, width * height + 3, 60])),
        "deposit": draw(st.sampled_from(["bilinear", "nearest"])),
        "spawn.enabled": draw(st.booleans()),
        "filter.enabled": filtered and draw(st.booleans()),
        "convergence.enabled": draw(st.booleans()),
        "convergence.threshold": draw(st.sampled_from([0.3, 0.9])),
        "noise.std": draw(st.sampled_from([0.0, 0.2])),
        "movement.max_displacement": draw(st.sampled_from([0.4, 5.0])),
    }
    model = {"energy_dim": draw(st.integers(1, 3)), "residual_energy": draw(st.booleans())}
    displacement = draw(st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    return Case(lattice, model, displacement, seed=draw(st.integers(0, 99)), training=draw(st.booleans()))


def run(case: Case, embedding: Tensor | None = None, rows: Tensor | None = None) -> FlowOutput:
    embedding = case.embedding() if embedding is None else embedding
    with torch.no_grad():
        return case.processor()(embedding, case.rows() if rows is None else rows, record_trajectories=True)


@given(cases())
@settings(max_examples=40)
def test_no_flow_is_lost(case: Case) -> None:
    output = run(case)
    assert int(output.faults.lost) == 0
    landings, trajectories = output.landings, output.trajectories
    assert trajectories is not None
    used = trajectories.active.any(0)  # every flow is active when it is created
    assert not (landings.landed & ~used).any()
    assert not (landings.projected & ~landings.landed).any()
    statistics = {key: float(value) for key, value in output.statistics.items()}
    counts = {key: round(case.batch * statistics[key]) for key in ("created", "landed", "removed")}  # per sample
    assert counts["created"] == used.sum() == counts["landed"] + counts["removed"]
    assert counts["landed"] == landings.landed.sum()
    assert statistics["created"] == pytest.approx(counts["created"] / case.batch, rel=1e-6)
    if not case.lattice["filter.enabled"]:
        assert torch.equal(landings.landed, used), "every flow lands"
        assert statistics["removed"] == 0
    assert statistics["share_z0"] + statistics["share_zdepth"] == pytest.approx(1.0 if landings.landed.any() else 0.0)


@given(cases())
@example(EARLY_ENDS)
@settings(max_examples=40)
def test_conservation_at_every_step(case: Case) -> None:
    output = run(case)
    counts = {key: value.tolist() for key, value in output.by_step.items()}
    settings_ = case.lattice_settings()
    assert all(len(values) == settings_.num_steps + 1 for values in counts.values())
    assert output.trajectories is not None
    assert counts["active"] == output.trajectories.active.sum((1, 2)).tolist()
    for step, (created, *parts) in enumerate(zip(*(counts[key] for key in ("created", *PARTS)), strict=True)):
        assert created == sum(parts), f"after step {step}: {dict(zip(PARTS, parts, strict=True))}"
    for key in ("created", "reached", "projected", "removed"):
        assert counts[key] == sorted(counts[key])
    assert counts["created"][0] == counts["active"][0] == case.batch * settings_.num_cells
    assert counts["created"][-1] <= case.batch * settings_.capacity
    if not case.lattice["convergence.enabled"]:
        assert not any(counts["projected"]), "without early ends flows are projected after the last step"
    landings = output.landings
    assert counts["active"][-1] + counts["projected"][-1] == landings.projected.sum()
    assert counts["reached"][-1] == (landings.landed & ~landings.projected).sum()


def test_early_ends_are_among_the_cases() -> None:
    """Some flows are projected early while others are active, reached or removed: no part of the sum is always 0."""
    counts = run(EARLY_ENDS).by_step
    together = torch.stack([counts[part] for part in PARTS]) > 0
    assert together.all(0).any(), "all four at once"


@given(cases())
@settings(max_examples=40)
def test_places_and_figures_are_in_range(case: Case) -> None:
    output = run(case)
    trajectories, landings = output.trajectories, output.landings
    assert trajectories is not None
    created = trajectories.active.any(0)
    assert (trajectories.position[:, created][..., :2].abs() <= 1).all()
    assert (trajectories.position[:, created][..., 2].abs() <= 1).all()
    assert (trajectories.position[-1][landings.landed][..., 2].abs() == 1).all()
    landed = landings.landed
    assert ((landings.distance[landed] >= 0) & (landings.distance[landed] <= 1)).all()
    assert (landings.distance[landed & ~landings.projected] == 0).all()
    assert (landings.distance[landed & landings.projected] > 0).all()
    assert ((landings.steps[landed] >= 0) & (landings.steps[landed] <= case.lattice_settings().num_steps)).all()
    assert 0 <= output.statistics["coverage"] <= 1
    assert 0 <= output.statistics["active_share"] <= 1
    assert all(value.ndim == 0 and torch.isfinite(value.double()) for value in output.statistics.values())
    assert torch.isfinite(output.embedding).all()


@given(cases(), st.permutations(range(3)))
@settings(max_examples=30)
def test_samples_do_not_touch(case: Case, order: list[int]) -> None:
    embedding, rows = case.embedding(), case.rows()
    together = run(case)
    permuted = run(case, embedding[order], rows[order])
    for place, sample in enumerate(order):
        alone = run(case, embedding[[sample]], rows[[sample]])
        compare_sample(permuted, place, together, sample)
        compare_sample(alone, 0, together, sample)


def compare_sample(first: FlowOutput, i: int, second: FlowOutput, j: int) -> None:
    assert torch.equal(first.landings.landed[i], second.landings.landed[j])
    assert torch.equal(first.faults.no_landing[i], second.faults.no_landing[j])
    for field in ("embedding", "surface", "input_surface"):
        a, b = getattr(first, field)[i], getattr(second, field)[j]
        torch.testing.assert_close(a, b, rtol=0, atol=SURFACE_TOLERANCE)
    landed = first.landings.landed[i]
    for field in ("xy", "distance", "energy", "steps", "plane", "projected"):
        a, b = getattr(first.landings, field)[i][landed], getattr(second.landings, field)[j][landed]
        torch.testing.assert_close(a, b, rtol=0, atol=SURFACE_TOLERANCE)


def test_noise_follows_rows_not_places() -> None:
    case = Case({"noise.std": 0.3}, training=True, batch=2)
    embedding = case.embedding()[:1].expand(2, -1)
    same, other = run(case, embedding, torch.tensor([4, 4])), run(case, embedding, torch.tensor([4, 5]))
    torch.testing.assert_close(same.surface[0], same.surface[1], rtol=0, atol=SURFACE_TOLERANCE)
    assert (other.surface[0] - other.surface[1]).abs().max() > 1e-3


@given(cases(filtered=False))
@settings(max_examples=20)
def test_constant_energies_stay_constant_under_nearest(case: Case) -> None:
    """With whole weights, the average of a constant is the constant."""
    case = dataclasses.replace(case, lattice={**case.lattice, "deposit": "nearest"})
    processor, landings = case.processor(), run(case).landings
    same = dataclasses.replace(landings, energy=torch.full_like(landings.energy, 0.7))
    surface = processor.lattice.collect_completed_flows_surface_direct(same)
    hit = (surface != 0).all(-1)
    assert hit.any(dim=1).all()
    torch.testing.assert_close(surface[hit], torch.full_like(surface[hit], 0.7), rtol=0, atol=1e-13)
    assert (surface[~hit] == 0).all()


def landings_at(xy: Tensor, energy: Tensor) -> Landings:
    """One sample; `xy` [M, 2], `energy` [M, E]; all reached their planes after two steps."""
    count = xy.shape[0]
    ones = torch.ones(1, count, dtype=torch.bool)
    whole = torch.ones(1, count, dtype=torch.int64)
    zero = torch.zeros(1, count, dtype=xy.dtype)
    return Landings(ones, ~ones, xy[None], whole, zero, 2 * whole, energy[None])


def surfaces_along_a_line(deposit: str) -> Tensor:
    """The surface for 4,001 positions of one of three landings, on a line through the plane."""
    case = Case({"width": 4, "height": 3, "deposit": deposit})
    lattice = case.processor().lattice
    start, end = torch.tensor([-1.0, -0.7], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    others = torch.tensor([[0.1, 0.2], [-0.8, 0.9]], dtype=torch.float64)
    energy = torch.tensor([[0.8], [-1.5], [0.4]], dtype=torch.float64)
    places = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        return torch.stack(
            [
                lattice.collect_completed_flows_surface_direct(
                    landings_at(torch.cat([(start + t * (end - start))[None], others]), energy)
                )[0]
                for t in places
            ]
        )


def test_surface_moves_continuously_with_bilinear_landings() -> None:
    jumps = surfaces_along_a_line("bilinear").diff(dim=0).abs().amax()
    assert jumps < 0.02  # slope of a few per unit, times 2.6 / 4,000 units
    assert surfaces_along_a_line("nearest").diff(dim=0).abs().amax() > 0.1, "the test would see a jump"


def test_both_planes_share_a_group() -> None:
    """Landings in one cell are averaged together, also when they are on different planes."""
    lattice = Case().processor().lattice
    xy = torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64)
    landings = landings_at(xy, torch.tensor([[0.5], [-0.5]], dtype=torch.float64))
    landings = dataclasses.replace(landings, plane=torch.tensor([[0, 1]]))
    surface = lattice.collect_completed_flows_surface_direct(landings)
    assert torch.equal(surface, torch.zeros_like(surface))  # equal scores, opposite energies


def test_autocast_leaves_the_geometry_alone() -> None:
    """bfloat16 has 8 bits: near the border, positions rounded to it would be multiples of 2^-9."""
    case = Case({"width": 4, "height": 4})
    processor = case.processor().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = processor(case.embedding().float(), record_trajectories=True)
    assert output.trajectories is not None
    for name, tensor in tensors_of({"landings": output.landings, "trajectories": output.trajectories}).items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
            assert not torch.equal(tensor, tensor.bfloat16().float()), name
    assert output.surface.dtype == torch.float32
    exact = processor(case.embedding().float()).surface
    assert (output.surface - exact).abs().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_keeps_its_dtype_throughout(dtype: torch.dtype) -> None:
    case = Case({"spawn.enabled": True, "noise.std": 0.1}, training=True)
    output = case.processor().to(dtype)(case.embedding().to(dtype), case.rows(), record_trajectories=True)
    values = dataclasses.replace(output, statistics={})  # shares of counts are no geometry
    floating = {name: tensor for name, tensor in tensors_of(values).items() if tensor.is_floating_point()}
    assert len(floating) >= 8
    assert {name: tensor.dtype for name, tensor in floating.items() if tensor.dtype != dtype} == {}


def test_float32_is_close_to_float64() -> None:
    case = Case({"max_steps": 2})
    exact, rounded = case.processor()(case.embedding()), case.processor().float()(case.embedding().float())
    assert torch.equal(exact.landings.landed, rounded.landings.landed)
    torch.testing.assert_close(rounded.surface.double(), exact.surface, rtol=0, atol=1e-5)
    assert exact.embedding.shape == (3, DIM)
