"""Landings and trajectories of random walks, with every kind of end. No model is needed."""

import torch

from energy_flow.core.energy_lattice import Landings
from energy_flow.core.flow_step import fold
from energy_flow.core.geometry import cell_centres
from energy_flow.core.history import Trajectories


def random_walk(
    batch: int, width: int, height: int, energy_dim: int, num_steps: int, spare: int = 0
) -> tuple[Landings, Trajectories]:
    """Flows of a W x H lattice. `spare` more slots hold children from step 1. Step 2 removes some flows."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_cells = width * height
    slots = num_cells + spare
    position = torch.zeros(batch, slots, 3)
    position[:, :num_cells, :2] = cell_centres(width, height, torch.float32, torch.device("cpu"))
    created = (torch.arange(slots) < num_cells).expand(batch, slots)
    ended = torch.zeros(batch, slots, dtype=torch.bool)
    removed, steps = ended.clone(), torch.zeros(batch, slots, dtype=torch.int64)
    positions, actives, lengths = [position], [created & ~ended], []
    drift = normal(batch, slots, 3) * 0.3
    for step in range(1, num_steps + 1):
        active = actives[-1]
        move = (drift + normal(batch, slots, 3) * 0.05) * active[..., None]
        position = position + move
        reached = active & (position[..., 2].abs() >= 1)
        position = torch.cat([fold(position[..., :2]), position[..., 2:].clamp(-1, 1)], dim=-1)
        steps = steps + active
        if step == 1:
            created = torch.ones_like(created)
            position[:, num_cells:] = positions[-1][:, :spare]
        if step == 2:
            removed = active & ~reached & (normal(batch, slots) > 1)
        ended = ended | reached | removed
        positions.append(position)
        actives.append(created & ~ended)
        lengths.append(move.norm(dim=-1))
    z = position[..., 2]
    plane = (z > 0).long()
    landed = created & ~removed
    positions[-1] = position.clone()
    positions[-1][..., 2] = torch.where(landed, plane * 2.0 - 1, z)
    landings = Landings(
        landed=landed,
        projected=landed & ~ended,
        xy=position[..., :2],
        plane=plane,
        distance=torch.where(plane == 0, 1 + z, 1 - z),
        steps=steps,
        energy=torch.tanh(normal(batch, slots, energy_dim)),
    )
    displacement = torch.stack(lengths) if lengths else torch.zeros(0, batch, slots)
    return landings, Trajectories(torch.stack(positions), torch.stack(actives), displacement)
