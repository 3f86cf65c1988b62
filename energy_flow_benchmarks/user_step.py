"""The same lattice as a user of plain PyTorch writes it: a loop over steps, around a recurrent network.

`benchmark=step` measures the framework against it. Networks, landings and aggregation are the framework's own modules
and functions, with the same weights; what differs is who computes the steps. Three ways to remember: `nn.GRU` called
with sequences of one step, one `nn.GRUCell` per layer, and the cells' formula written out, which a compiler can fuse.

Letters: B samples, S cells, N = B * S flows, D embedding dimension, E energy dimension, H hidden size, L layers.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.flow_step import MoveRule, move
from energy_flow.core.geometry import cell_centres
from energy_flow.core.tensorized_flow_storage import FinishedFlows, FlowStatus
from energy_flow_benchmarks.workload import Dtype, Step, forward_backward

Recurrence = Literal["gru", "cells", "formula"]
Memory = Tensor | tuple[Tensor, ...]  # of all layers: [L, N, H] as `nn.GRU` has it, otherwise L times [N, H]


class UserModel(nn.Module):
    """Embeddings [B, D] to embeddings [B, D].

    Args:
        processor: whose networks and lattice it uses. Noise, children, removal and convergence are not in this loop.
        recurrence: how flows remember.
        compiled: every step by `torch.compile`, as one graph for exactly one size.
    """

    def __init__(self, processor: FlowProcessor, recurrence: Recurrence, compiled: bool = False) -> None:
        super().__init__()
        self.processor = processor
        self.gru = gru_of(processor.carrier) if recurrence == "gru" else None
        self.remember = {"gru": self._remember_gru, "cells": self._remember_cells, "formula": self._remember_formula}[
            recurrence
        ]
        self.one_step = torch.compile(self._step, fullgraph=True, dynamic=False) if compiled else self._step

    def forward(self, embedding: Tensor) -> Tensor:
        lattice, carrier = self.processor.lattice, self.processor.carrier
        settings = lattice.settings
        surface = self.processor.map_in(embedding).to(self.processor.dtype)  # autocast or not
        batch, num_cells, energy_dim = surface.shape
        centres = cell_centres(settings.width, settings.height, surface.dtype, surface.device)

        position = nn.functional.pad(centres, (0, 1)).repeat(batch, 1)  # [N, 3], on the input plane
        energy = surface.reshape(-1, energy_dim)
        memory: Memory = surface.new_zeros(len(carrier.cells), batch * num_cells, carrier.hidden_size)
        if self.gru is None:
            memory = tuple(memory)
        active = torch.ones(batch * num_cells, dtype=torch.bool, device=surface.device)
        steps = torch.zeros(batch * num_cells, dtype=torch.int64, device=surface.device)
        scale = self.processor.displacement_scale()
        for _ in range(settings.num_steps):
            steps = steps + active
            position, energy, memory, active = self.one_step(position, energy, memory, active, scale)

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
        self, position: Tensor, energy: Tensor, memory: Memory, active: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Memory, Tensor]:
        """One step of all flows: position [N, 3], energy [N, E], memory, active bool [N]."""
        features = self.processor.neuron(position, energy)
        top, memory = self.remember(torch.cat([features, energy], dim=-1), memory)
        decision = self.processor.carrier.heads(top)
        limit, residual = self.processor.settings.movement.max_displacement, self.processor.model.residual_energy
        rule = MoveRule(scale, scale.new_full((), limit), residual)
        position, energy, _, reached = move(position, energy, active, decision, None, *rule)
        return position, energy, memory, active & ~reached

    def _remember_gru(self, read: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        assert self.gru is not None
        top, memory = self.gru(read[None], memory)
        return top[0], memory

    def _remember_cells(self, read: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        layer_input, following = read, []
        for cell, own in zip(self.processor.carrier.cells, memory, strict=True):
            layer_input = cell(layer_input, own)
            following.append(layer_input)
        return layer_input, tuple(following)

    def _remember_formula(self, read: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        following = self.processor.carrier.recur(read, tuple(memory))
        return following[-1], following


def gru_of(carrier: EnergyCarrier) -> nn.GRU:
    """The carrier's cells as one `nn.GRU`: copies of their weights."""
    cells = carrier.gru_cells()
    first = cells[0].weight_ih
    gru = nn.GRU(cells[0].input_size, carrier.hidden_size, len(cells), device=first.device, dtype=first.dtype)
    with torch.no_grad():
        for layer, cell in enumerate(cells):
            for name, value in cell.named_parameters():
                getattr(gru, f"{name}_l{layer}").copy_(value)
    return gru


def parameters_of(model: UserModel) -> dict[str, nn.Parameter]:
    """All parameters under the processor's names; of `nn.GRU` its own ones in the cells' place."""
    named = dict(model.processor.named_parameters())
    if model.gru is not None:
        for name in [name for name in named if name.startswith("carrier.cells.")]:
            layer, weight = name.removeprefix("carrier.cells.").split(".")
            named[name] = getattr(model.gru, f"{weight}_l{layer}")
    return named


def graphed_step(model: UserModel, embedding: Tensor, cotangent: Tensor, dtype: Dtype) -> Step:
    """Forward and backward as one CUDA graph: gradients are written to the same places in every replay."""
    parameters = parameters_of(model)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # compile and set up libraries outside of the recording
        for _ in range(2):
            _let_go(parameters)
            forward_backward(model, embedding, cotangent, dtype)
    torch.cuda.current_stream().wait_stream(beside)
    _let_go(parameters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward_backward(model, embedding, cotangent, dtype)

    def run() -> Tensor:
        graph.replay()
        return out

    return Step(run, parameters)


def _let_go(parameters: dict[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None
