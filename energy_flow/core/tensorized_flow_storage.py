"""Flows as tensors: slots of a [B, M] grid, their bookkeeping in pooled buffers, batched removal.

The sample of a slot is its row; the first S slots of a row are its cells, children follow in the order
in which they were born. Slots are never reused within a rollout, so a flow needs no other name.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

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
    hidden: tuple[Tensor, ...]  # L tensors [B, M, H]


class TensorPool:
    """Named buffers that are allocated once and reused; they grow on demand and shrink when trimmed.

    What a pool hands out is scratch: it never leaves the rollout, and autograd never saves it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._needed: dict[tuple[str, torch.dtype, torch.device], int] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer `name` as a zeroed tensor of `shape`. A second call hands out the same memory."""
        key = (name, dtype, device)
        size = math.prod(shape)
        self._needed[key] = max(size, self._needed.get(key, 0))
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = _plain_buffer(size, dtype, device)
        return buffer[:size].view(shape).zero_()

    def trim(self) -> int:
        """Shrink every buffer to the most that was needed since the last call; returns the bytes freed."""
        before = self.nbytes
        for key in list(self._buffers):
            needed = self._needed.get(key, 0)
            if needed == 0:
                del self._buffers[key]
            elif needed < self._buffers[key].numel():
                self._buffers[key] = _plain_buffer(needed, key[1], key[2])
        self._needed.clear()
        return before - self.nbytes


def _plain_buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Never an inference tensor, whoever asks first: training could not write to it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


class TensorizedFlowStorage:
    """All flows of one batch.

    The differentiable state is replaced as a whole in every step; the bookkeeping around it (status, steps,
    age, counters), which autograd doesn't watch, is written in place.

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
        self.status[:, :num_flows] = FlowStatus.ACTIVE
        self.created.fill_(num_flows)

    def where(self, status: FlowStatus) -> Tensor:
        """Bool mask [B, M] of the slots with this status."""
        return self.status == status

    @property
    def landed(self) -> Tensor:
        """Bool mask [B, M] of the flows that have landed."""
        return self.where(FlowStatus.REACHED) | self.where(FlowStatus.PROJECTED)

    def advance(self, state: FlowState, reached: Tensor) -> None:
        """Take over one step of the active flows; `reached` [B, M] ends flows on a plane."""
        active = self.where(FlowStatus.ACTIVE)
        moved = active[..., None]
        self.state = FlowState(
            torch.where(moved, state.position, self.state.position),
            torch.where(moved, state.energy, self.state.energy),
            state.hidden,  # nothing reads the memory of a flow that has ended
        )
        self.steps += active
        self.age += active
        self.end(active & reached, FlowStatus.REACHED)

    def end(self, mask: Tensor, status: FlowStatus) -> None:
        """End the flows of `mask` [B, M], all in one operation."""
        self.status.masked_fill_(mask, status)

    def spawn(self, num_children: Tensor, birthplace: Tensor) -> None:
        """Give every flow its children: a copy of its energy, memory and steps, of age 0.

        Args:
            num_children: [B, M] int64.
            birthplace: [B, M, 3], where the children of each flow begin.

        Slots are given out in the order of the parents' slots; what doesn't fit is counted as overflow.
        """
        last = torch.cumsum(num_children, dim=1)  # children of slots <= m
        wanted = last[:, -1]
        accepted = torch.minimum(wanted, self.capacity - self.created)
        order = torch.arange(self.capacity, device=last.device) - self.created[:, None]  # which child a slot takes
        born = (order >= 0) & (order < accepted[:, None])
        parent = torch.searchsorted(last, order, right=True).clamp(max=self.capacity - 1)

        def inherit(own: Tensor, parents: Tensor) -> Tensor:
            index = parent[..., None].expand(-1, -1, parents.shape[-1])
            return torch.where(born[..., None], parents.gather(1, index), own)

        self.state = FlowState(
            inherit(self.state.position, birthplace),
            inherit(self.state.energy, self.state.energy),
            tuple(inherit(hidden, hidden) for hidden in self.state.hidden),
        )
        self.steps.copy_(torch.where(born, self.steps.gather(1, parent), self.steps))
        self.age.masked_fill_(born, 0)
        self.status.masked_fill_(born, FlowStatus.ACTIVE)
        self.created += accepted
        self.overflow += wanted - accepted

    def unaccounted(self) -> Tensor:
        """Created flows that are in no slot, summed over samples: 0 unless a flow was lost (int64 scalar)."""
        return (self.created - (self.status != FlowStatus.FREE).sum(1)).abs().sum()
