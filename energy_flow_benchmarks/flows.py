"""The flows of `benchmark=report`, and their two forms: Python objects (before) and tensors (now)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensorized_flow_storage import FlowState, FlowStatus, TensorizedFlowStorage
from energy_flow_benchmarks import before
from energy_flow_benchmarks.workload import settings_of

EMBEDDING_DIM = 8
NAMES = {
    FlowStatus.ACTIVE: before.ACTIVE,
    FlowStatus.REACHED: before.REACHED,
    FlowStatus.PROJECTED: before.PROJECTED,
    FlowStatus.REMOVED: before.REMOVED,
}


class FlowTensors(NamedTuple):
    """Flows of one batch. Neither side may write to them."""

    position: Tensor  # [B, M, 3]
    energy: Tensor  # [B, M, E]
    hidden: Tensor  # [B, M, H]
    steps: Tensor  # int64 [B, M]
    status: Tensor  # uint8 [B, M]


def plane_of(num_flows: int) -> tuple[int, int]:
    """Return width and height of a plane with one cell per flow, as square as possible."""
    height = next(size for size in range(math.isqrt(num_flows), 0, -1) if num_flows % size == 0)
    return num_flows // height, height


def report_lattice(width: int, height: int, **changes: Any) -> LatticeSettings:
    """Return the default lattice with changes, where one landing touches one cell, as in the analysis."""
    return settings_of(LatticeSettings, "lattice", {"width": width, "height": height, "deposit": "nearest", **changes})


def finished_flows(
    samples: int, lattice: LatticeSettings, energy_dim: int, hidden_size: int, device: torch.device, seed: int
) -> FlowTensors:
    """Draw flows after their last step: 5% removed, half of the others on a plane, the rest projected.

    Every flow is inside a random cell, away from its border, so that rounding cannot change the cell.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, lattice.num_cells)

    def coordinate(num_cells: int) -> Tensor:
        cell = torch.randint(num_cells, shape, generator=generator)
        place = cell + 0.8 * (torch.rand(shape, generator=generator) - 0.5)
        return (2 * place / max(num_cells - 1, 1) - 1).clamp(-1, 1)

    fate = torch.rand(shape, generator=generator)
    status = torch.full(shape, FlowStatus.PROJECTED, dtype=torch.uint8)
    status[fate < 0.525] = FlowStatus.REACHED
    status[fate < 0.05] = FlowStatus.REMOVED
    z = 1.8 * torch.rand(shape, generator=generator) - 0.9
    z = torch.where(status == FlowStatus.REACHED, z.sign(), z)
    flows = FlowTensors(
        position=torch.stack([coordinate(lattice.width), coordinate(lattice.height), z], dim=-1),
        energy=torch.randn(*shape, energy_dim, generator=generator).tanh(),
        hidden=torch.randn(*shape, hidden_size, generator=generator),
        steps=torch.randint(1, lattice.num_steps + 1, shape, generator=generator),
        status=status,
    )
    return FlowTensors(*(value.to(device) for value in flows))


def under_way(flows: FlowTensors) -> FlowTensors:
    """Return the same flows in the middle of a rollout: the projected ones are still active."""
    return flows._replace(status=flows.status.masked_fill(flows.status == FlowStatus.PROJECTED, FlowStatus.ACTIVE))


def as_list(flows: FlowTensors) -> before.Flows:
    """Make one object per flow, with tensors of its own. Energies and positions need gradients, as in training."""
    listed: before.Flows = {}
    status, steps = flows.status.tolist(), flows.steps.tolist()
    for sample in range(flows.position.shape[0]):
        for slot in range(flows.position.shape[1]):
            listed[len(listed)] = before.ListFlow(
                sample=sample,
                position=flows.position[sample, slot].clone().requires_grad_(),
                energy=flows.energy[sample, slot].clone().requires_grad_(),
                hidden=[flows.hidden[sample, slot].clone()],
                steps=steps[sample][slot],
                status=NAMES[status[sample][slot]],
            )
    return listed


@dataclass(frozen=True)
class TensorFlows:
    """Flows in the framework's own storage."""

    storage: TensorizedFlowStorage
    hidden: Tensor  # [B, M, H]; the rollout holds it as long as the flows


def as_tensors(flows: FlowTensors) -> TensorFlows:
    """Copy the flows into the framework's storage. Energies and positions need gradients, as in training."""
    state = FlowState(
        position=flows.position.clone().requires_grad_(),
        energy=flows.energy.clone().requires_grad_(),
    )
    storage = TensorizedFlowStorage(state, flows.position.shape[1], TensorPool())
    storage.status.copy_(flows.status)
    storage.steps.copy_(flows.steps)
    return TensorFlows(storage, flows.hidden.clone())
