"""Builders of tiny lattices, and comparisons with the reference."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow.core.rollout import RolloutSettings
from energy_flow.ops.counter_noise import counter_noise
from energy_flow.settings import read
from tests.reference import Reference
from tests.reference_flows import ReferenceOutput

DIM = 5
FORWARD_TOLERANCE = 1e-10  # float64 rounding of a few hundred operations, times the gain of a few steps
GRADIENT_TOLERANCE = 1e-9  # ten times more: sums over flows and steps
SMALLEST_MARGIN = 1e-5  # rounding differences of 1e-12 can't flip a decision this far from its threshold

LATTICE: dict[str, Any] = {
    "width": 3,
    "height": 2,
    "depth": 6,
    "max_steps": None,
    "max_flows_per_sample": None,
    "tensorized_storage_enabled": True,
    "deposit": "bilinear",
    "movement": {"scale": 1.0, "warmup_steps": 0, "decay_steps": 0, "final_scale": 1.0, "max_displacement": 1.1},
    "noise": {"std": 0.0, "z": False},
    "spawn": {"enabled": False, "threshold": 0.3, "max_spawn_per_step": 2},
    "filter": {"enabled": False, "min_displacement": 0.05},
    "convergence": {"enabled": False, "threshold": 0.9, "min_steps": 1, "patience": 2},
    "aggregation": None,
}
MODEL: dict[str, Any] = {
    "energy_dim": 1,
    "residual_energy": False,
    "features": 4,
    "hidden_size": 5,
    "num_layers": 1,
    "maps": "learned",
    "map_hidden": None,
    "skip": False,
    "neuron": None,
    "carrier": None,
    "map_in": None,
    "map_out": None,
}


def section(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `defaults` with `changes`, whose keys may be dotted (`spawn.enabled`)."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in defaults.items()}
    for key, value in changes.items():
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            target = target[parent]
        if last not in target:
            raise KeyError(key)
        target[last] = value
    return result


def lattice_settings(**changes: Any) -> LatticeSettings:
    """Settings of a 3 x 2 x 6 lattice; `spawn__enabled=True` changes `spawn.enabled`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return read(LatticeSettings, section(LATTICE, dotted), "lattice")


def model_settings(**changes: Any) -> ModelSettings:
    return read(ModelSettings, section(MODEL, changes), "model")


@dataclass(frozen=True)
class Case:
    """A tiny lattice with strong heads, and the events that must happen in it."""

    lattice: Mapping[str, Any] = field(default_factory=dict)  # changes to LATTICE, dotted keys
    model: Mapping[str, Any] = field(default_factory=dict)  # changes to MODEL
    displacement: float = 1.0  # gain of the displacement head
    seed: int = 2
    batch: int = 3
    training: bool = False
    optimizer_step: int = 0
    rollout: Mapping[str, Any] = field(default_factory=dict)  # changes to the automatic settings
    expect: tuple[str, ...] = ()  # events of the reference that must occur
    absent: tuple[str, ...] = ()

    def lattice_settings(self) -> LatticeSettings:
        return read(LatticeSettings, section(LATTICE, self.lattice), "lattice")

    def model_settings(self) -> ModelSettings:
        return read(ModelSettings, section(MODEL, self.model), "model")

    def processor(self) -> FlowProcessor:
        rollout = RolloutSettings.automatic().model_copy(update=dict(self.rollout))
        lattice, model = self.lattice_settings(), self.model_settings()
        processor = FlowProcessor(DIM, lattice, model, seed=self.seed, rollout=rollout).double()
        fill_parameters(processor, self.seed, self.displacement)
        processor.optimizer_step.fill_(self.optimizer_step)
        return processor.train(self.training)

    def embedding(self) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + self.seed)
        values = torch.randn(self.batch, DIM, dtype=torch.float64, generator=generator)
        return torch.nn.functional.normalize(values, dim=-1).requires_grad_()

    def rows(self) -> Tensor:
        return torch.arange(self.batch) * 7 + 3


def fill_parameters(module: nn.Module, seed: int, displacement: float) -> None:
    """Fill parameters with values that depend only on their names. Activations stay away from 0 and from saturation."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        size = 1.5 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
        if name.endswith("cell_value"):
            size = 0.5
        if "displacement_head" in name:
            size *= displacement
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator) * size)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Check shape, absence of NaN, and equality up to `tolerance` times the largest expected entry (at least 1)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(expected.double()).all(), f"{what}: the expected values are not finite"
    difference = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * max(1.0, expected.double().abs().max().item())
    assert difference <= limit, f"{what}: differs by {difference:.3g}, allowed {limit:.3g}"


def reference_of(case: Case, processor: FlowProcessor, embedding: Tensor, rows: Tensor) -> ReferenceOutput:
    lattice = case.lattice_settings()
    noise: Callable[[int, int, int], Tensor] | None = None
    if case.training and lattice.noise.std > 0:

        def noise(step: int, row: int, slot: int) -> Tensor:
            optimizer_step = torch.tensor(case.optimizer_step)
            return counter_noise(case.seed, optimizer_step, step, torch.tensor([row]), slot + 1, torch.float64)[0, slot]

    reference = Reference(processor, lattice, case.model_settings().residual_energy, case.optimizer_step, noise)
    return reference.run(embedding, rows.tolist())


def reference_of_training(processor: FlowProcessor, embedding: Tensor, rows: Tensor) -> ReferenceOutput:
    """`reference_of` for a processor in training with noise, at its own optimiser step."""
    optimizer_step = processor.optimizer_step.clone()

    def noise(step: int, row: int, slot: int) -> Tensor:
        return counter_noise(processor.seed, optimizer_step, step, torch.tensor([row]), slot + 1, torch.float64)[
            0, slot
        ]

    reference = Reference(processor, processor.settings, processor.model.residual_energy, int(optimizer_step), noise)
    return reference.run(embedding, rows.tolist())


def gradients(processor: FlowProcessor, embedding: Tensor, output: FlowOutput | ReferenceOutput) -> dict[str, Tensor]:
    """Gradients of all parameters and of the embedding for random cotangents of embedding and surface."""
    generator = torch.Generator().manual_seed(7)
    on_embedding, on_surface = (
        torch.randn(value.shape, dtype=value.dtype, generator=generator) for value in (output.embedding, output.surface)
    )
    loss = (output.embedding * on_embedding).sum() + (output.surface * on_surface).sum()
    named = {**dict(processor.named_parameters()), "embedding": embedding}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(named.items(), found, strict=True)
    }


def check_case(case: Case) -> tuple[FlowOutput, ReferenceOutput]:
    """Run a case with processor and reference, and compare everything. Its events must happen, away from thresholds."""
    processor, embedding, rows = case.processor(), case.embedding(), case.rows()
    expected = reference_of(case, processor, embedding, rows)
    for event in case.expect:
        assert expected.events[event] > 0, f"{event} did not happen: {dict(expected.events)}"
    for event in case.absent:
        assert expected.events[event] == 0, f"{event} happened: {dict(expected.events)}"
    margins = expected.margins
    assert margins.smallest > SMALLEST_MARGIN, f"{margins.name} came within {margins.smallest:.2g} of its threshold"
    actual = processor(embedding, rows, record_trajectories=True)
    compare_outputs(actual, expected)
    compare_gradients(gradients(processor, embedding, actual), gradients(processor, embedding, expected))
    return actual, expected


def compare_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_near(actual[name], expected[name], GRADIENT_TOLERANCE, f"gradient of {name}")


def compare_outputs(actual: FlowOutput, expected: ReferenceOutput) -> None:
    assert_near(actual.surface, expected.surface, FORWARD_TOLERANCE, "surface")
    assert_near(actual.embedding, expected.embedding, FORWARD_TOLERANCE, "embedding")
    compare_landings(actual, expected)
    compare_counts(actual, expected)
    compare_trajectories(actual, expected)


def compare_landings(actual: FlowOutput, expected: ReferenceOutput) -> None:
    landings = actual.landings
    mask = torch.zeros_like(landings.landed)
    for sample, flow in expected.landings():
        mask[sample, flow.slot] = True
        place = (sample, flow.slot)
        what = f"landing of slot {flow.slot} of sample {sample}"
        assert bool(landings.projected[place]) == (flow.status == "projected"), what
        assert int(landings.plane[place]) == flow.plane, what
        assert int(landings.steps[place]) == flow.steps, what
        assert flow.distance is not None
        assert_near(landings.distance[place], flow.distance, FORWARD_TOLERANCE, f"distance, {what}")
        assert_near(landings.xy[place], flow.position[:2], FORWARD_TOLERANCE, f"xy, {what}")
        assert_near(landings.energy[place], flow.energy, FORWARD_TOLERANCE, f"energy, {what}")
    assert landings.landed.dtype == torch.bool
    assert torch.equal(landings.landed, mask), "landed: other slots than the reference's"


def compare_counts(actual: FlowOutput, expected: ReferenceOutput) -> None:
    for key in ("created", "active", "reached", "removed", "projected"):
        assert actual.by_step[key].tolist() == expected.by_step[key], f"by_step {key}"
    assert int(actual.faults.overflow) == expected.overflow
    assert int(actual.faults.lost) == 0
    if expected.overflow:
        assert int(actual.faults.needed) == expected.needed
    nothing_landed = [not any(flow.landed for flow in sample.flows) for sample in expected.samples]
    assert actual.faults.no_landing.tolist() == nothing_landed, "no_landing"
    assert actual.statistics.keys() == expected.statistics().keys()
    for key, value in expected.statistics().items():
        assert_near(actual.statistics[key], torch.tensor(value), 1e-6, f"statistics {key}")


def compare_trajectories(actual: FlowOutput, expected: ReferenceOutput) -> None:
    trajectories = actual.trajectories
    assert trajectories is not None
    assert not trajectories.position.requires_grad
    num_steps = len(expected.snapshots) - 1
    for step, samples in enumerate(expected.snapshots):
        active = torch.zeros_like(trajectories.active[step])
        for sample, snapshots in enumerate(samples):
            for slot, snapshot in enumerate(snapshots):
                active[sample, slot] = snapshot.active
                if step < num_steps:
                    where = f"position at step {step} of slot {slot} of sample {sample}"
                    assert_near(trajectories.position[step, sample, slot], snapshot.position, FORWARD_TOLERANCE, where)
        assert torch.equal(trajectories.active[step], active), f"active at step {step}"
    total = torch.tensor(sum(expected.lengths), dtype=torch.float64)
    assert_near(trajectories.displacement.sum(), total, FORWARD_TOLERANCE, "sum of displacements")
    for sample, flow in expected.landings():
        last = trajectories.position[-1, sample, flow.slot]
        landing = torch.cat([flow.position[:2].detach(), last.new_tensor([1.0 if flow.plane else -1.0])])
        assert_near(last, landing, FORWARD_TOLERANCE, f"last position of slot {flow.slot} of sample {sample}")


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of nested dataclasses, dicts and sequences, by their path."""
    if isinstance(value, Tensor):
        return {path: value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {}
    return {name: tensor for key, item in value.items() for name, tensor in tensors_of(item, f"{path}.{key}").items()}
