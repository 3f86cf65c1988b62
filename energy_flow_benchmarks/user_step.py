"""A flow lattice as a user of plain PyTorch writes it: a loop over steps, around a recurrent network.

`benchmark=step` compares the framework with it. Networks, landings and aggregation are the framework's own, with the
same weights. Only the loop over the steps differs. It has three recurrent networks: `nn.GRU` on sequences of one step,
one `nn.GRUCell` per layer, and the cells' formula in tensor operations, which a compiler can fuse.

Letters: B samples, S cells, N = B * S flows, D embedding dimension, E energy dimension, H hidden size, L layers.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.flow_step import MoveRule, move
from energy_flow.core.geometry import cell_centres
from energy_flow.core.tensorized_flow_storage import FinishedFlows, FlowStatus

Recurrence = Literal["gru", "cells", "formula"]
Hidden = Tensor | tuple[Tensor, ...]  # of all layers: [L, N, H] for `nn.GRU`, otherwise L tensors [N, H]


class UserModel(nn.Module):
    """Embeddings [B, D] to embeddings [B, D].

    Args:
        processor: gives networks and lattice. The loop has no noise, children, filter or convergence.
        recurrence: the recurrent network.
        compiled: `torch.compile` for each step, as one graph for a single size.
    """

    def __init__(self, processor: FlowProcessor, recurrence: Recurrence, compiled: bool = False) -> None:
        super().__init__()
        self.processor = processor
        self.gru = gru_of(processor.carrier) if recurrence == "gru" else None
        self.recur = {"gru": self._gru, "cells": self._cells, "formula": self._formula}[recurrence]
        self.one_step = torch.compile(self._step, fullgraph=True, dynamic=False) if compiled else self._step

    def forward(self, embedding: Tensor) -> Tensor:
        lattice, carrier = self.processor.lattice, self.processor.carrier
        settings = lattice.settings
        surface = self.processor.map_in(embedding).to(self.processor.dtype)  # also under autocast
        batch, num_cells, energy_dim = surface.shape
        centres = cell_centres(settings.width, settings.height, surface.dtype, surface.device)

        position = nn.functional.pad(centres, (0, 1)).repeat(batch, 1)  # [N, 3], on the input plane
        energy = surface.reshape(-1, energy_dim)
        hidden: Hidden = surface.new_zeros(len(carrier.cells), batch * num_cells, carrier.hidden_size)
        if self.gru is None:
            hidden = tuple(hidden)
        active = torch.ones(batch * num_cells, dtype=torch.bool, device=surface.device)
        steps = torch.zeros(batch * num_cells, dtype=torch.int64, device=surface.device)
        scale = self.processor.displacement_scale()
        for _ in range(settings.num_steps):
            steps = steps + active
            position, energy, hidden, active = self.one_step(position, energy, hidden, active, scale)

        flows = FinishedFlows(
            position=position.view(batch, num_cells, 3),
            energy=energy.view(batch, num_cells, energy_dim),
            status=torch.where(active, FlowStatus.PROJECTED, FlowStatus.REACHED).view(batch, num_cells),
            steps=steps.view(batch, num_cells),
            created=torch.full((batch,), num_cells, device=surface.device),
            overflow=torch.zeros(batch, dtype=torch.int64, device=surface.device),
        )
        deposits = lattice.collect(lattice.landings(flows))
        return self.processor.read_out(lattice.aggregate(deposits, batch)[0], embedding)

    def _step(
        self, position: Tensor, energy: Tensor, hidden: Hidden, active: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Hidden, Tensor]:
        """Move all flows one step: position [N, 3], energy [N, E], hidden state, active bool [N]."""
        features = self.processor.neuron(position, energy)
        top, hidden = self.recur(torch.cat([features, energy], dim=-1), hidden)
        decision = self.processor.carrier.heads(top.to(energy.dtype))
        limit, residual = self.processor.settings.movement.max_displacement, self.processor.model.residual_energy
        rule = MoveRule(scale, scale.new_full((), limit), residual)
        position, energy, _, reached = move(position, energy, active, decision, None, *rule)
        return position, energy, hidden, active & ~reached

    def _gru(self, inputs: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        assert self.gru is not None
        top, hidden = self.gru(inputs[None], hidden)
        return top[0], hidden

    def _cells(self, inputs: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        new = []
        for cell, own in zip(self.processor.carrier.cells, hidden, strict=True):
            inputs = cell(inputs, own)
            new.append(inputs)
        return inputs, tuple(new)

    def _formula(self, inputs: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        new = self.processor.carrier.recur(inputs, tuple(hidden))
        return new[-1], new


def gru_of(carrier: EnergyCarrier) -> nn.GRU:
    """Copy the weights of the carrier's cells into one `nn.GRU`."""
    cells = [cast(nn.GRUCell, cell) for cell in carrier.cells]
    first = cells[0].weight_ih
    gru = nn.GRU(cells[0].input_size, carrier.hidden_size, len(cells), device=first.device, dtype=first.dtype)
    with torch.no_grad():
        for layer, cell in enumerate(cells):
            for name, value in cell.named_parameters():
                getattr(gru, f"{name}_l{layer}").copy_(value)
    return gru


def parameters_of(model: UserModel) -> dict[str, nn.Parameter]:
    """Return all parameters by the processor's names; those of `nn.GRU` take the place of the cells'."""
    named = dict(model.processor.named_parameters())
    if model.gru is not None:
        for name in [name for name in named if name.startswith("carrier.cells.")]:
            layer, weight = name.removeprefix("carrier.cells.").split(".")
            named[name] = getattr(model.gru, f"{weight}_l{layer}")
    return named
