"""What is written down about a rollout while it runs: counts of every step, and paths where they are asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.tensorized_flow_storage import FinishedFlows, FlowStatus, TensorizedFlowStorage

_COUNTED = (FlowStatus.ACTIVE, FlowStatus.REACHED, FlowStatus.PROJECTED, FlowStatus.REMOVED)


@dataclass(frozen=True)
class Trajectories:
    """Paths of all flows, detached."""

    position: Tensor  # [T + 1, B, M, 3]; stands still once a flow has ended; the last entry is on a plane
    active: Tensor  # bool [T + 1, B, M]: active at the start of step t; entry T: before projection
    displacement: Tensor  # [T, B, M]: length of each move, 0 where not active


@dataclass(frozen=True)
class Counts:
    """Sums over flows; those of parts of a batch add up to those of the batch."""

    by_step: dict[str, Tensor]  # created, active, reached, projected, removed after each step, [T + 1]; entry 0: start
    lost: Tensor  # int64 scalar: flows in no slot at some step, or neither landed nor removed at the end
    distance: Tensor  # scalar: lengths of all moves

    def __add__(self, other: "Counts") -> "Counts":
        by_step = {name: count + other.by_step[name] for name, count in self.by_step.items()}
        return Counts(by_step, self.lost + other.lost, self.distance + other.distance)

    def clone(self) -> "Counts":
        by_step = {name: count.clone() for name, count in self.by_step.items()}
        return Counts(by_step, self.lost.clone(), self.distance.clone())

    @property
    def num_moves(self) -> Tensor:
        """Moves of single flows, int64 scalar."""
        return self.by_step["active"][:-1].sum()


class History:
    """Device tensors throughout: looking at a step copies its status, counting waits for the end."""

    def __init__(self, keep_paths: bool) -> None:
        self._keep_paths = keep_paths
        self._status: list[Tensor] = []
        self._created: list[Tensor] = []
        self._distance: list[Tensor] = []
        self._position: list[Tensor] = []
        self._displacement: list[Tensor] = []

    def look(self, storage: TensorizedFlowStorage) -> None:
        """At the start, and after every step."""
        self._status.append(storage.status.clone())
        self._created.append(storage.created.clone())
        if self._keep_paths:
            self._position.append(storage.state.position.detach())

    def moved(self, length: Tensor) -> None:
        """`length` [B, M] of a step's moves, 0 for flows that didn't move."""
        self._distance.append(length.sum())
        if self._keep_paths:
            self._displacement.append(length)

    def counts(self, flows: FinishedFlows) -> Counts:
        status, created = torch.stack(self._status), torch.stack(self._created)
        by_step = {"created": created.sum(1)}
        for kind in _COUNTED:
            by_step[kind.name.lower()] = (status == kind).sum((1, 2))
        unaccounted = (created - (status != FlowStatus.FREE).sum(2)).abs().sum()
        ended = (flows.landed | flows.removed).sum(1)
        lost = unaccounted + (flows.created - ended).abs().sum()
        distance = torch.stack(self._distance).sum() if self._distance else flows.position.new_zeros(())
        return Counts(by_step, lost, distance)

    def trajectories(self, flows: FinishedFlows) -> Trajectories | None:
        """None where no paths were kept."""
        if not self._keep_paths:
            return None
        position = torch.stack(self._position)
        z = position[-1, ..., 2]
        plane = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        position[-1, ..., 2] = torch.where(flows.landed, plane, z)
        moves = torch.stack(self._displacement) if self._displacement else position.new_zeros(0, *z.shape)
        return Trajectories(position, torch.stack(self._status) == FlowStatus.ACTIVE, moves)
