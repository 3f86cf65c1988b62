"""Flows as tensors: slots of a [B, M] grid, their bookkeeping in pooled buffers, batched removal.

The sample of a slot is its row; the first S slots of a row are its cells, children follow in the order
in which they were born. Slots are never reused within a rollout, so a flow needs no other name.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor


class FlowStatus(IntEnum):
    """What has become of a slot."""

    FREE = 0
    ACTIVE = 1
    REACHED = 2  # ended on an output plane
    PROJECTED = 3  # ended short of a plane and was put on the nearest one
    REMOVED = 4  # ended by the displacement filter: doesn't land


@dataclass(frozen=True)
class FlowState:
    """The differentiable part of all flows: what one step maps to the next."""

    position: Tensor  # [B, M, 3], normalised, float32 or float64
    energy: Tensor  # [B, M, E], same dtype


@dataclass(frozen=True)
class Births:
    """Which slots a child was born in, and of whom."""

    born: Tensor  # bool [B, M]
    parent: Tensor  # int64 [B, M]: the parent's slot; any number where no child was born

    def inherit(self, own: Tensor, parents: Tensor) -> Tensor:
        """`parents` [B, M, ...] at the parent's slot where a child was born, `own` elsewhere."""
        index = self.parent[..., None].expand(-1, -1, parents.shape[-1])
        return torch.where(self.born[..., None], parents.gather(1, index), own)

    def bequeath(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The way back of `inherit`: gradients of `own` and of `parents`."""
        index = self.parent[..., None].expand(-1, -1, gradient.shape[-1])
        childrens = torch.where(self.born[..., None], gradient, 0.0)
        return torch.where(self.born[..., None], 0.0, gradient), torch.zeros_like(gradient).scatter_add(
            1, index, childrens
        )

    def source(self) -> Tensor:
        """Where each slot takes its memory from, as an index into all B * M slots, flat."""
        batch, capacity = self.born.shape
        slots = torch.arange(batch * capacity, device=self.born.device).view(batch, capacity)
        return torch.where(self.born, self.parent + slots[:, :1], slots).flatten()


@dataclass(frozen=True)
class FinishedFlows:
    """All flows of a batch after their last step; nothing of it is a pooled buffer."""

    position: Tensor  # [B, M, 3]
    energy: Tensor  # [B, M, E]
    status: Tensor  # uint8 [B, M], FlowStatus
    steps: Tensor  # int64 [B, M]
    created: Tensor  # int64 [B]
    overflow: Tensor  # int64 [B]

    @property
    def landed(self) -> Tensor:
        """Bool mask [B, M] of the flows that have landed."""
        return (self.status == FlowStatus.REACHED) | (self.status == FlowStatus.PROJECTED)

    @property
    def removed(self) -> Tensor:
        """Bool mask [B, M] of the flows that were removed."""
        return self.status == FlowStatus.REMOVED


class Clearable(Protocol):
    def clear(self) -> None: ...


class TensorPool:
    """Named buffers that are allocated once and reused; they grow on demand and shrink when trimmed.

    What a pool hands out is scratch: it never leaves the rollout, and autograd never saves it.

    Attributes:
        dependants: who relies on where the buffers are; cleared before the memory of one is let go.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._needed: dict[tuple[str, torch.dtype, torch.device], int] = {}
        self.dependants: list[Clearable] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": {}, "_needed": {}}  # a copy begins empty

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer `name` as a tensor of `shape`, with anything in it. A second call hands out the same memory."""
        key = (name, dtype, device)
        size = math.prod(shape)
        self._needed[key] = max(size, self._needed.get(key, 0))
        if key in self._buffers and self._buffers[key].numel() < size:
            self._release(key)
        if key not in self._buffers:
            self._buffers[key] = _plain_buffer(size, dtype, device)
        return self._buffers[key][:size].view(shape)

    def clear(self) -> None:
        """Let go of all buffers."""
        for key in list(self._buffers):
            self._release(key)

    def trim(self) -> int:
        """Shrink every buffer to the most that was needed since the last call; returns the bytes freed."""
        before = self.nbytes
        for key in list(self._buffers):
            needed = self._needed.get(key, 0)
            if needed == self._buffers[key].numel():
                continue
            self._release(key)
            if needed > 0:
                self._buffers[key] = _plain_buffer(needed, key[1], key[2])
        self._needed.clear()
        return before - self.nbytes

    def _release(self, key: tuple[str, torch.dtype, torch.device]) -> None:
        for dependant in self.dependants:
            dependant.clear()
        del self._buffers[key]


def _plain_buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Never an inference tensor, whoever asks first: training could not write to it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


class TensorizedFlowStorage:
    """All flows of one batch.

    The differentiable state is replaced as a whole in every step; the bookkeeping around it (status, steps,
    age, counters), which autograd doesn't watch, is written in place. What flows remember lies with the
    rollout, which knows how it is best kept.

    Args:
        state: the flows to start with, slots [0, num_flows) of every row in use.
        num_flows: S.
        pool: where the bookkeeping lives; valid until the next storage is made from the same pool.
    """

    def __init__(self, state: FlowState, num_flows: int, pool: TensorPool) -> None:
        batch, capacity = state.position.shape[:2]
        device = state.position.device
        self.state = state
        self.capacity = capacity
        self.status = pool.take("status", (batch, capacity), torch.uint8, device)  # [B, M] FlowStatus
        self.steps = pool.take("steps", (batch, capacity), torch.int64, device)  # [B, M]
        self.age = pool.take("age", (batch, capacity), torch.int64, device)  # [B, M]
        self.created = pool.take("created", (batch,), torch.int64, device)  # [B]
        self.overflow = pool.take("overflow", (batch,), torch.int64, device)  # [B]
        for counter in (self.status, self.steps, self.age, self.overflow):
            counter.zero_()
        self.status[:, :num_flows] = FlowStatus.ACTIVE
        self.created.fill_(num_flows)

    def where(self, status: FlowStatus) -> Tensor:
        """Bool mask [B, M] of the slots with this status."""
        return self.status == status

    def finished(self) -> FinishedFlows:
        """The flows as they are now, in memory of their own."""
        counters = (self.status, self.steps, self.created, self.overflow)
        return FinishedFlows(self.state.position, self.state.energy, *(counter.clone() for counter in counters))

    def advance(self, state: FlowState, reached: Tensor) -> None:
        """Take over one step; `reached` (bool [B, M]) ends flows on a plane."""
        active = self.where(FlowStatus.ACTIVE)
        self.state = state
        self.steps += active
        self.age += active
        self.end(reached, FlowStatus.REACHED)

    def end(self, mask: Tensor, status: FlowStatus) -> None:
        """End the flows of `mask` [B, M], all in one operation."""
        self.status.masked_fill_(mask, status)

    def spawn(self, num_children: Tensor, birthplace: Tensor) -> Births:
        """Give every flow its children: a copy of its energy and steps, of age 0.

        Args:
            num_children: [B, M] int64.
            birthplace: [B, M, 3], where the children of each flow begin.

        Returns:
            Who was born of whom, for what is kept elsewhere.

        Slots are given out in the order of the parents' slots; what doesn't fit is counted as overflow.
        """
        last = torch.cumsum(num_children, dim=1)  # children of slots <= m
        wanted = last[:, -1]
        accepted = torch.minimum(wanted, self.capacity - self.created)
        order = torch.arange(self.capacity, device=last.device) - self.created[:, None]  # which child a slot takes
        born = (order >= 0) & (order < accepted[:, None])
        parent = torch.searchsorted(last, order, right=True).clamp(max=self.capacity - 1)

        births = Births(born, parent)
        self.state = FlowState(
            births.inherit(self.state.position, birthplace), births.inherit(self.state.energy, self.state.energy)
        )
        self.steps.copy_(torch.where(born, self.steps.gather(1, parent), self.steps))
        self.age.masked_fill_(born, 0)
        self.status.masked_fill_(born, FlowStatus.ACTIVE)
        self.created += accepted
        self.overflow += wanted - accepted
        return births
