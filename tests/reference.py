"""One forward pass of a flow lattice, flow by flow. It is slow and simple, and follows only the rules.

It takes only parameters from a `FlowProcessor`, and computes everything in loops over samples, flows, steps and
cells. Everything is differentiable: `backward()` gives gradients of the processor's own parameters.

Letters: B samples, D embedding dimension, S cells, E energy dimension, H hidden size, L GRU layers, T steps.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energy_flow.core.maps import ConvMapIn, ConvMapOut
from tests import reference_parts as parts
from tests.reference_flows import Flow, Margins, ReferenceOutput, Sample, Snapshot, number

NoiseFunction = Callable[[int, int, int], Tensor]  # (rollout step from 0, data row, slot) -> [3] standard normal


def displacement_scale(movement: Any, optimizer_step: int) -> float:
    """The scale after warm-up over `warmup_steps`, then decay to the share `final_scale` over `decay_steps`."""
    warm = min(1.0, (optimizer_step + 1) / (movement.warmup_steps + 1))
    if movement.decay_steps == 0:
        return movement.scale * warm
    progress = min(1.0, max(0, optimizer_step - movement.warmup_steps) / movement.decay_steps)
    return movement.scale * warm * (1.0 + (movement.final_scale - 1.0) * progress)


class Reference:
    """Runs rules 1 to 7 for one batch.

    Args:
        processor: gives the parameters.
        lattice: lattice settings.
        residual_energy: energy + head instead of tanh(head).
        optimizer_step: for the displacement schedule.
        noise: standard normal values, or None for none at all.
    """

    def __init__(
        self, processor: Any, lattice: Any, residual_energy: bool, optimizer_step: int, noise: NoiseFunction | None
    ) -> None:
        self.processor, self.lattice, self.residual_energy, self.noise = processor, lattice, residual_energy, noise
        self.scale = displacement_scale(lattice.movement, optimizer_step)
        self.num_cells = lattice.width * lattice.height
        self.max_steps = lattice.depth // 2 if lattice.max_steps is None else lattice.max_steps
        self.capacity = lattice.max_flows_per_sample
        if self.capacity is None:
            self.capacity = 2 * self.num_cells if lattice.spawn.enabled else self.num_cells
        self.aggregation = processor.lattice.aggregation
        self.margins = Margins()
        self.events: Counter[str] = Counter()
        self.by_step: dict[str, list[int]] = {
            key: [] for key in ("created", "active", "reached", "removed", "projected")
        }
        self.snapshots: list[list[list[Snapshot]]] = []
        self.lengths: list[float] = []
        self.hit_cells = 0

    def run(self, embedding: Tensor, rows: list[int] | None = None) -> ReferenceOutput:
        """Run a batch: embedding [B, D] and the data row of each sample -> all results of the pass."""
        batch = embedding.shape[0]
        rows = list(range(batch)) if rows is None else rows
        energies = self.map_in(embedding)
        samples = [
            Sample(rows[b], self.place(energies[b]), sensed=parts.sense(self.processor.neuron, energies[b]))
            for b in range(batch)
        ]
        self.record(samples)
        for k in range(1, self.max_steps + 1):
            for sample in samples:
                self.advance(sample, k)
            self.record(samples)
        for sample in samples:
            self.project(sample.active())
        surface = torch.stack([self.collect(sample) for sample in samples])
        return ReferenceOutput(
            embedding=self.map_out(surface) + self.skip(embedding),
            surface=surface,
            samples=samples,
            by_step=self.by_step,
            snapshots=self.snapshots,
            lengths=self.lengths,
            hit_cells=self.hit_cells,
            margins=self.margins,
            events=self.events,
        )

    # Rule 1

    def map_in(self, embedding: Tensor) -> Tensor:
        """Rows of unit length enter with entries of size one."""
        mapper = self.processor.map_in
        batch, dim = embedding.shape
        if self.processor.model.maps == "identity":
            return embedding.reshape(batch, self.num_cells, self.processor.model.energy_dim)
        if isinstance(mapper, ConvMapIn):
            return torch.stack([parts.conv_map_in(mapper, row) for row in embedding])
        spread = mapper.network(embedding * math.sqrt(dim)).reshape(batch, self.num_cells, -1)
        return spread + mapper.cell_value

    def place(self, energies: Tensor) -> list[Flow]:
        """energies [S, E] -> one flow per cell, in the middle plane."""
        width, height = self.lattice.width, self.lattice.height
        flows = []
        for y in range(height):
            for x in range(width):
                centre = [
                    2 * x / (width - 1) - 1 if width > 1 else 0.0,
                    2 * y / (height - 1) - 1 if height > 1 else 0.0,
                ]
                position = torch.tensor([*centre, 0.0], dtype=energies.dtype)
                flows.append(Flow(slot=y * width + x, position=position, energy=energies[y * width + x]))
        return flows

    # Rules 2 to 4, for one sample and the step k counted from 1

    def advance(self, sample: Sample, k: int) -> None:
        ended_before = sample.count("reached", "removed")
        moved = sample.active()
        before = {flow.slot: flow.position for flow in moved}
        for flow in moved:
            self.move(flow, k, sample)
        if self.lattice.spawn.enabled and k < self.max_steps:
            for parent in [flow for flow in moved if flow.status == "active"]:
                self.spawn(sample, parent, before[parent.slot])
        if self.lattice.filter.enabled:
            for flow in [flow for flow in moved if flow.status == "active"]:
                self.margins.note("filter", flow.length - self.lattice.filter.min_displacement)
                if flow.length < self.lattice.filter.min_displacement:
                    flow.status = "removed"
                    self.events["removed"] += 1
        if self.lattice.convergence.enabled and self.has_converged(sample, k, ended_before):
            self.project(sample.active())

    def move(self, flow: Flow, k: int, sample: Sample) -> None:
        features = parts.neuron_features(self.processor.neuron, flow.position, flow.energy, sample.sensed, self.margins)
        decision, flow.hidden = parts.carrier_step(self.processor.carrier, features, flow.energy, flow.hidden)
        energy = decision[:-3]
        flow.energy = flow.energy + energy if self.residual_energy else torch.tanh(energy)
        displacement = self.displacement(decision[-3:])
        if self.noise is not None:
            displacement = displacement + self.exploration(k, sample.row, flow.slot, displacement)
        flow.length = math.sqrt(sum(number(d) ** 2 for d in displacement))
        self.lengths.append(flow.length)
        position = flow.position + displacement
        flow.position = torch.stack([self.reflect(position[0]), self.reflect(position[1]), position[2]])
        flow.steps += 1
        flow.age += 1
        self.complete(flow)

    def displacement(self, head: Tensor) -> Tensor:
        limit = self.lattice.movement.max_displacement
        axes = []
        for value in self.scale * head:
            self.margins.note("clamp", abs(number(value)) - limit)
            if number(value) > limit:
                self.events["clamped"] += 1
                value = torch.full_like(value, limit)
            elif number(value) < -limit:
                self.events["clamped"] += 1
                value = torch.full_like(value, -limit)
            axes.append(value)
        return torch.stack(axes)

    def exploration(self, k: int, row: int, slot: int, like: Tensor) -> Tensor:
        assert self.noise is not None
        normal = self.noise(k - 1, row, slot).to(like.dtype) * self.lattice.noise.std
        self.events["noise"] += 1
        return normal if self.lattice.noise.z else torch.stack([normal[0], normal[1], torch.zeros_like(normal[2])])

    def reflect(self, x: Tensor) -> Tensor:
        crossings, rest = 0, x
        self.margins.note("fold", (abs(number(x)) - 1.0) % 2.0)
        self.margins.note("fold", 2.0 - (abs(number(x)) - 1.0) % 2.0)
        while not -1.0 <= number(rest) <= 1.0:
            rest = 2.0 - rest if number(rest) > 1.0 else -2.0 - rest
            crossings += 1
        self.events["reflected"] += crossings > 0
        self.events["reflected_twice"] += crossings > 1
        return rest

    def complete(self, flow: Flow) -> None:
        z = number(flow.position[2])
        self.margins.note("plane", abs(z) - 1.0)
        if abs(z) < 1.0:
            return
        flow.status, flow.plane, flow.distance = "reached", int(z > 0), torch.zeros((), dtype=flow.position.dtype)
        flow.position = torch.cat([flow.position[:2], torch.full_like(flow.position[2:], math.copysign(1.0, z))])
        self.events[f"reached_{'zdepth' if z > 0 else 'z0'}"] += 1

    def spawn(self, sample: Sample, parent: Flow, position_before: Tensor) -> None:
        settings = self.lattice.spawn
        ratio = parent.length / settings.threshold
        self.margins.note("spawn", (ratio - round(ratio)) * settings.threshold)
        if parent.length <= settings.threshold:
            return
        wanted = min(math.floor(ratio) - 1, settings.max_spawn_per_step)
        self.events["parents"] += wanted > 0
        self.events["parents_of_several"] += wanted > 1
        self.events["spawn_limited"] += math.floor(ratio) - 1 > settings.max_spawn_per_step
        for _ in range(wanted):
            if len(sample.flows) == self.capacity:
                sample.overflow += 1
                continue
            child = Flow(len(sample.flows), position_before, parent.energy, parent.hidden, age=0, steps=parent.steps)
            sample.flows.append(child)
            self.events["spawned"] += 1

    def has_converged(self, sample: Sample, k: int, ended_before: int) -> bool:
        settings = self.lattice.convergence
        ended = sample.count("reached", "removed")
        if not sample.active() or k < settings.min_steps:
            return False
        share = ended / len(sample.flows)
        self.margins.note("convergence", share - settings.threshold)
        if k > settings.min_steps:
            sample.idle = sample.idle + 1 if ended == ended_before else 0
        by_share, by_patience = share >= settings.threshold, sample.idle >= settings.patience
        if k < self.max_steps:  # after the last step it has no effect
            self.events["converged_by_share"] += by_share
            self.events["converged_by_patience"] += by_patience and not by_share
        return by_share or by_patience

    # Rule 5

    def project(self, flows: list[Flow]) -> None:
        for flow in flows:
            z = flow.position[2]
            if z.requires_grad:
                self.margins.note("nearest plane", z)
            flow.status, flow.plane = "projected", int(number(z) > 0)
            flow.distance = 1.0 - z if flow.plane else 1.0 + z
            self.events["projected"] += 1

    # Rule 6

    def collect(self, sample: Sample) -> Tensor:
        """Landings of one sample -> surface [S, E]: for every cell all of its members, one after the other."""
        members: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(self.num_cells)]
        for flow in sample.flows:
            if not flow.landed:
                continue
            score = self.score(flow)
            for cell, weight in self.deposit(flow):
                members[cell].append((weight, score, flow.energy))
        cells = []
        for of_cell in members:
            if not of_cell:
                cells.append(torch.zeros_like(sample.flows[0].energy))
                continue
            self.hit_cells += number(sum(weight for weight, _, _ in of_cell)) > 0
            self.events["shared_cells"] += len(of_cell) > 1
            cells.append(parts.aggregate(self.aggregation, of_cell, self.margins))
        return torch.stack(cells)

    def score(self, flow: Flow) -> Tensor:
        assert flow.distance is not None
        return torch.linalg.vector_norm(flow.energy) / (1.0 + flow.distance) * (1.0 + 0.1 * flow.steps)

    def deposit(self, flow: Flow) -> list[tuple[int, Tensor]]:
        """(surface index, weight) of every cell to which a landing contributes."""
        x_shares = self.deposit_axis(flow.position[0], self.lattice.width)
        y_shares = self.deposit_axis(flow.position[1], self.lattice.height)
        return [(y * self.lattice.width + x, wx * wy) for y, wy in y_shares for x, wx in x_shares]

    def deposit_axis(self, coordinate: Tensor, cells: int) -> list[tuple[int, Tensor]]:
        one = torch.ones_like(coordinate)
        if cells == 1:
            return [(0, one)]
        place = (coordinate + 1.0) / 2.0 * (cells - 1)
        if self.lattice.deposit == "nearest":
            self.margins.note("cell", (number(place) + 0.5) - round(number(place) + 0.5))
            return [(min(max(math.floor(number(place) + 0.5), 0), cells - 1), one)]
        parts.note_kink(self.margins, coordinate, cells)
        return parts.bilinear_axis(coordinate, cells)

    # Rule 7

    def map_out(self, surface: Tensor) -> Tensor:
        """Divided by sqrt(D), as the map in multiplies by it."""
        if self.processor.model.maps == "identity":
            return surface.reshape(surface.shape[0], -1)
        mapper = self.processor.lattice.map_out
        if isinstance(mapper, ConvMapOut):
            return torch.stack([parts.conv_map_out(mapper, cells) for cells in surface])
        embedding = mapper.network(surface.reshape(surface.shape[0], -1))
        return embedding / math.sqrt(embedding.shape[1])

    def skip(self, embedding: Tensor) -> Tensor:
        gain = self.processor.skip_gain
        return torch.zeros_like(embedding) if gain is None else gain * embedding

    def record(self, samples: list[Sample]) -> None:
        self.by_step["created"].append(sum(len(sample.flows) for sample in samples))
        for status in ("active", "reached", "removed", "projected"):
            self.by_step[status].append(sum(sample.count(status) for sample in samples))
        self.snapshots.append(
            [
                [Snapshot(flow.position.detach().clone(), flow.status == "active") for flow in sample.flows]
                for sample in samples
            ]
        )
