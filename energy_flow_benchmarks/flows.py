"""The flows that both sides of `benchmark=report` work on, and the two forms that they are put into.

The one place that knows how finished flows get into the framework's own structures.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from energy_flow.config import config_dir
from energy_flow.core.energy_lattice import Deposits, EnergyLattice, LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensorized_flow_storage import FlowState, FlowStatus, TensorizedFlowStorage
from energy_flow.settings import read
from energy_flow_benchmarks import before

EMBEDDING_DIM = 8
DEPTH = 40
NAMES = {
    FlowStatus.ACTIVE: before.ACTIVE,
    FlowStatus.REACHED: before.REACHED,
    FlowStatus.PROJECTED: before.PROJECTED,
    FlowStatus.REMOVED: before.REMOVED,
}


@dataclass(frozen=True)
class FlowTensors:
    """Flows of one batch; neither side may write to them."""

    position: Tensor  # [B, M, 3]
    energy: Tensor  # [B, M, E]
    hidden: Tensor  # [B, M, H]
    steps: Tensor  # int64 [B, M]
    status: Tensor  # uint8 [B, M]

    @property
    def device(self) -> torch.device:
        return self.position.device


def plane_of(num_flows: int) -> tuple[int, int]:
    """Width and height of a plane of that many cells, as square as it can be."""
    height = next(size for size in range(math.isqrt(num_flows), 0, -1) if num_flows % size == 0)
    return num_flows // height, height


def lattice_settings(width: int, height: int, *, depth: int, max_steps: int | None = None) -> LatticeSettings:
    """The default lattice at another size; one landing goes to one cell, as in the report."""
    own = {"width": width, "height": height, "depth": depth, "max_steps": max_steps, "deposit": "nearest"}
    return read(LatticeSettings, {**_defaults("lattice"), **own}, "lattice")


def model_settings(energy_dim: int, hidden_size: int) -> ModelSettings:
    """The default networks at another size."""
    own = {"energy_dim": energy_dim, "hidden_size": hidden_size}
    return read(ModelSettings, {**_defaults("model"), **own}, "model")


def _defaults(group: str) -> dict[Any, Any]:
    """The default option of a config group, read by itself: Hydra composes one config at a time."""
    plain = OmegaConf.to_container(OmegaConf.load(Path(config_dir(), group, "default.yaml")))
    assert isinstance(plain, dict)
    return plain


def finished_flows(
    samples: int, lattice: LatticeSettings, energy_dim: int, hidden_size: int, device: torch.device, seed: int
) -> FlowTensors:
    """Flows after their last step: 1 in 20 was removed, half of the others reached a plane, the rest was projected.

    Every flow lies somewhere within a random cell, well away from its border: rounding can't change the cell.
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
    return FlowTensors(**{name: value.to(device) for name, value in vars(flows).items()})


def under_way(flows: FlowTensors) -> FlowTensors:
    """The same flows in the middle of a rollout: those that will be projected are still active."""
    status = flows.status.masked_fill(flows.status == FlowStatus.PROJECTED, FlowStatus.ACTIVE)
    return FlowTensors(**{**vars(flows), "status": status})


def as_list(flows: FlowTensors) -> before.Flows:
    """One object per flow, each with tensors of its own; energies and positions ask for gradients, as in training."""
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
    """The same flows as the framework keeps them."""

    storage: TensorizedFlowStorage
    memory: Tensor  # [B, M, H]: what flows remember lies with the rollout; kept here as long as the flows are


def as_tensors(flows: FlowTensors) -> TensorFlows:
    """The framework's storage, with memory of its own; energies and positions ask for gradients, as in training."""
    state = FlowState(
        position=flows.position.clone().requires_grad_(),
        energy=flows.energy.clone().requires_grad_(),
    )
    storage = TensorizedFlowStorage(state, flows.position.shape[1], TensorPool())
    storage.status.copy_(flows.status)
    storage.steps.copy_(flows.steps)
    return TensorFlows(storage, flows.hidden.clone())


def collect(lattice: EnergyLattice, flows: TensorFlows) -> Deposits:
    """Find the completed flows and their cells."""
    return lattice.collect(lattice.landings(flows.storage.finished()))


def select_active(flows: TensorFlows) -> tuple[Tensor, Tensor]:
    """Coordinates [A, 3] and energies [A, E] of the active flows. The rollout needs no more than the mask."""
    active = flows.storage.status == FlowStatus.ACTIVE
    return flows.storage.state.position[active], flows.storage.state.energy[active]


def bare_lattice(settings: LatticeSettings, energy_dim: int) -> EnergyLattice:
    """A lattice to collect with; nothing is read back from its surface."""
    return EnergyLattice(settings, energy_dim, nn.Identity())


def after_a_batch(samples: int, lattice: LatticeSettings, energy_dim: int, device: torch.device) -> FlowProcessor:
    """A processor that has just run a batch of as many flows, and holds what they left: what the cleanup is for."""
    one_step = lattice.model_copy(update={"max_steps": 1})
    processor = FlowProcessor(EMBEDDING_DIM, one_step, model_settings(energy_dim, hidden_size=4), seed=0).to(device)
    with torch.no_grad():
        processor(torch.randn(samples, EMBEDDING_DIM, device=device))
    return processor
