"""Flows as tensors: a grid of slots [B, M] with their state, status and counters.

A row of the grid is one sample. The first S slots of a row belong to its cells; children follow in the order of their
birth. A rollout never reuses a slot, so the slot identifies the flow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.tensor_pool import TensorPool


class FlowStatus:
    """What has become of a slot. All statuses above ACTIVE are final.

    They are plain numbers: torch.compile compares a tensor with an `IntEnum` as a whole.
    """

    FREE = 0
    ACTIVE = 1
    REACHED = 2  # ended on an output plane
    PROJECTED = 3  # ended before a plane and was put on the nearest one
    REMOVED = 4  # ended by the displacement filter: doesn't land


@dataclass(frozen=True)
class FlowState:
    """The differentiable state of all flows: the input and the output of one step."""

    position: Tensor  # [B, M, 3], normalised, float32 or float64
    energy: Tensor  # [B, M, E], same dtype


@dataclass(frozen=True)
class Births:
    """The slots of new children and of their parents."""

    born: Tensor  # bool [B, M]
    parent: Tensor  # int64 [B, M]: the parent's slot; arbitrary where no child was born

    def gather_from_parents(self, own: Tensor, parents: Tensor) -> Tensor:
        """Take `parents` [B, M, ...] at the parent's slot where a child was born, and `own` elsewhere."""
        trailing = (1,) * (parents.ndim - 2)
        index = self.parent.view(*self.parent.shape, *trailing).expand_as(parents)
        return torch.where(self.born.view(*self.born.shape, *trailing), parents.gather(1, index), own)

    def scatter_to_parents(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The backward pass of `gather_from_parents`: gradients of `own` and of `parents`."""
        index = self.parent[..., None].expand(-1, -1, gradient.shape[-1])
        of_children = torch.where(self.born[..., None], gradient, 0.0)
        return torch.where(self.born[..., None], 0.0, gradient), torch.zeros_like(gradient).scatter_add(
            1, index, of_children
        )

    def source(self) -> Tensor:
        """The slot from which each slot takes its hidden state, int64 [B * M], counted over all B * M slots."""
        batch, capacity = self.born.shape
        slots = torch.arange(batch * capacity, device=self.born.device).view(batch, capacity)
        return torch.where(self.born, self.parent + slots[:, :1], slots).flatten()


@dataclass(frozen=True)
class FinishedFlows:
    """All flows of a batch after their last step. No tensor is a pooled buffer."""

    position: Tensor  # [B, M, 3]
    energy: Tensor  # [B, M, E]
    status: Tensor  # uint8 [B, M], FlowStatus
    steps: Tensor  # int64 [B, M]
    created: Tensor  # int64 [B]
    overflow: Tensor  # int64 [B]: children without a slot


class TensorizedFlowStorage:
    """All flows of one batch.

    Every step replaces the differentiable state as a whole. Autograd doesn't watch the bookkeeping (status, steps,
    age, counters), so it is updated in place. Hidden states aren't stored here but in the `Stepper`.

    Args:
        state: the flows to start with; slots [0, num_flows) of every row are in use.
        num_flows: S.
        pool: holds the bookkeeping, which is valid until the pool serves the next storage.
    """

    def __init__(self, state: FlowState, num_flows: int, pool: TensorPool) -> None:
        batch, capacity = state.position.shape[:2]
        device = state.position.device
        self.state = state
        self.capacity = capacity
        self.status = pool.take("status", (batch, capacity), torch.uint8, device).zero_()  # [B, M] FlowStatus
        ages = pool.take("steps, age", (2, batch, capacity), torch.int64, device).zero_()
        counts = pool.take("created, overflow", (2, batch), torch.int64, device).zero_()
        # By index: torch.export fixes the batch size where a tensor is unpacked and its parts are written to.
        self.steps, self.age = ages[0], ages[1]  # [B, M]
        self.created, self.overflow = counts[0], counts[1]  # [B]
        self.status[:, :num_flows] = FlowStatus.ACTIVE
        self.created.fill_(num_flows)

    def advance(self, state: FlowState, reached: Tensor) -> None:
        """Store the state after one step; end the flows that reached a plane (`reached`, bool [B, M])."""
        active = self.status == FlowStatus.ACTIVE
        self.state = state
        self.steps += active
        self.age += active
        self.end(reached, FlowStatus.REACHED)

    def end(self, mask: Tensor, status: int) -> None:
        """End the flows of `mask` [B, M], all in one operation."""
        self.status.masked_fill_(mask, status)

    def spawn(self, num_children: Tensor, birthplace: Tensor) -> Births:
        """Give every flow its children: copies of its energy and steps, of age 0.

        Slots are assigned in the order of the parents' slots. Children without a slot are counted as overflow.

        Args:
            num_children: [B, M] int64.
            birthplace: [B, M, 3], the position of each flow's children.

        Returns:
            The slots of children and parents, for state that is stored elsewhere.
        """
        last = torch.cumsum(num_children, dim=1)  # children of slots <= m
        wanted = last[:, -1]
        accepted = torch.minimum(wanted, self.capacity - self.created)
        order = torch.arange(self.capacity, device=last.device) - self.created[:, None]  # which child a slot takes
        born = (order >= 0) & (order < accepted[:, None])
        parent = torch.searchsorted(last, order, right=True).clamp(max=self.capacity - 1)

        births = Births(born, parent)
        self.state = FlowState(
            position=births.gather_from_parents(self.state.position, birthplace),
            energy=births.gather_from_parents(self.state.energy, self.state.energy),
        )
        self.steps.copy_(torch.where(born, self.steps.gather(1, parent), self.steps))
        self.age.masked_fill_(born, 0)
        self.status.masked_fill_(born, FlowStatus.ACTIVE)
        self.created += accepted
        self.overflow += wanted - accepted
        return births

    def project(self) -> FinishedFlows:
        """Project all flows that are still active, and return all flows."""
        self.end(self.status == FlowStatus.ACTIVE, FlowStatus.PROJECTED)
        return self.finished()

    def finished(self) -> FinishedFlows:
        """The flows as they are now, in tensors of their own."""
        return FinishedFlows(
            position=self.state.position,
            energy=self.state.energy,
            status=self.status.clone(),
            steps=self.steps.clone(),
            created=self.created.clone(),
            overflow=self.overflow.clone(),
        )
