"""The method of the earlier code base: one Python object per flow, loops, dictionaries, `.item()`, a stack per group.

This is the "before" side of `benchmark=report`, slow on purpose; nothing else imports it. It has its own cells and
statuses: a fault in those of the framework must show as a difference. It follows the performance
analysis: a list comprehension finds completed flows, a dictionary groups them by coordinate, a loop aggregates group
by group with new tensors, and flows are deleted one by one.

Letters: B samples, W x H cells, S = W * H, E energy dimension, H hidden size, L layers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from energy_flow.core.flow_processor import FlowProcessor

ACTIVE, REACHED, PROJECTED, REMOVED = "active", "reached", "projected", "removed"
Cell = tuple[int, int, int]  # sample, x, y


@dataclass(eq=False)
class ListFlow:
    """One flow."""

    sample: int
    position: Tensor  # [3]
    energy: Tensor  # [E]
    hidden: list[Tensor]  # L tensors [H]
    steps: int = 0
    status: str = ACTIVE


Flows = dict[int, ListFlow]  # by id


def select_active(flows: Flows) -> tuple[Tensor, Tensor]:
    """Return positions [A, 3] and energies [A, E] of the active flows."""
    active = [flow for flow in flows.values() if flow.status == ACTIVE]
    return torch.stack([flow.position for flow in active]), torch.stack([flow.energy for flow in active])


def collect(flows: Flows, width: int, height: int) -> dict[Cell, list[ListFlow]]:
    """Group the completed flows by sample and cell."""
    completed = [flow for flow in flows.values() if flow.status in (REACHED, PROJECTED)]
    groups: dict[Cell, list[ListFlow]] = {}
    for flow in completed:
        x = nearest_cell(flow.position[0].item(), width)
        y = nearest_cell(flow.position[1].item(), height)
        groups.setdefault((flow.sample, x, y), []).append(flow)
    return groups


def nearest_cell(coordinate: float, num_cells: int) -> int:
    """Return the cell of a normalised coordinate."""
    place = (coordinate + 1) / 2 * (num_cells - 1)
    return min(max(math.floor(place + 0.5), 0), num_cells - 1)


def aggregate(groups: dict[Cell, list[ListFlow]], batch: int, width: int, height: int, empty: Tensor) -> Tensor:
    """Return the softmax average of every group, a surface [B, S, E]; a cell without landings holds `empty` [E]."""
    surfaces = []
    for sample in range(batch):
        cells = []
        for y in range(height):
            for x in range(width):
                members = groups.get((sample, x, y))
                cells.append(_average(members) if members else empty)
        surfaces.append(torch.stack(cells))
    return torch.stack(surfaces)


def _average(members: list[ListFlow]) -> Tensor:
    energies = torch.stack([flow.energy for flow in members])
    distances = torch.stack([_distance(flow.position[2]) for flow in members])
    steps = torch.tensor([flow.steps for flow in members], dtype=energies.dtype, device=energies.device)
    scores = torch.linalg.vector_norm(energies, dim=-1) / (1 + distances) * (1 + 0.1 * steps)
    weights = torch.softmax(scores, dim=0)
    return (weights[:, None] * energies).sum(0)


def _distance(z: Tensor) -> Tensor:
    """Return the distance to the nearest plane; z = 0 goes to z0."""
    return 1 - z if z.item() > 0 else 1 + z


def cleanup(flows: Flows, device: torch.device) -> int:
    """Delete the ended flows one by one, empty the device's cache every time, and return how many flows are left."""
    for key in [key for key, flow in flows.items() if flow.status != ACTIVE]:
        del flows[key]
    # The earlier code also reset the peak counters here. This benchmark reads them, so it does not.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return len(flows)


def forward(processor: FlowProcessor, embedding: Tensor) -> Tensor:
    """Run a forward pass, flow by flow, with the processor's parameters: embedding [B, D] -> [B, D]."""
    settings = processor.settings
    surface = processor.map_in(embedding)
    flows = _place(surface, processor)
    scale = processor.displacement_scale()
    for _ in range(settings.num_steps):
        for flow in flows.values():
            if flow.status == ACTIVE:
                _step(flow, processor, scale)
    for flow in flows.values():
        if flow.status == ACTIVE:
            flow.status = PROJECTED
    groups = collect(flows, settings.width, settings.height)
    landed = aggregate(groups, len(embedding), settings.width, settings.height, torch.zeros_like(surface[0, 0]))
    cleanup(flows, embedding.device)
    return processor.read_out(landed, embedding)


def _place(surface: Tensor, processor: FlowProcessor) -> Flows:
    """Place one flow per cell of a surface [B, S, E], in the middle plane."""
    width, height = processor.settings.width, processor.settings.height
    flows: Flows = {}
    for sample in range(surface.shape[0]):
        for y in range(height):
            for x in range(width):
                flows[len(flows)] = ListFlow(
                    sample=sample,
                    position=surface.new_tensor([_centre(x, width), _centre(y, height), 0.0]),
                    energy=surface[sample, y * width + x],
                    hidden=[surface.new_zeros(processor.model.hidden_size) for _ in range(processor.model.num_layers)],
                )
    return flows


def _centre(cell: int, num_cells: int) -> float:
    """Return the normalised coordinate of a cell's centre."""
    return 2 * cell / (num_cells - 1) - 1 if num_cells > 1 else 0.0


def _step(flow: ListFlow, processor: FlowProcessor, scale: Tensor) -> None:
    carrier = processor.carrier
    features = processor.neuron.network(torch.cat([flow.position, flow.energy]))
    top = torch.cat([features, flow.energy])
    hidden = []
    for cell, old in zip(carrier.cells, flow.hidden, strict=True):
        assert isinstance(cell, nn.GRUCell)
        top = cell(top, old)
        hidden.append(top)
    change = carrier.energy_head(top)
    flow.energy = flow.energy + change if processor.model.residual_energy else torch.tanh(change)
    flow.hidden = hidden
    limit = processor.settings.movement.max_displacement
    moved = flow.position + (scale * carrier.displacement_head(top)).clamp(-limit, limit)
    z = moved[2]
    if abs(z.item()) >= 1:
        z = torch.full_like(z, math.copysign(1.0, z.item()))
        flow.status = REACHED
    flow.position = torch.stack([_reflect(moved[0]), _reflect(moved[1]), z])
    flow.steps += 1


def _reflect(coordinate: Tensor) -> Tensor:
    while abs(coordinate.item()) > 1:
        coordinate = math.copysign(2.0, coordinate.item()) - coordinate
    return coordinate
