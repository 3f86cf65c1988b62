"""The record of a rollout: counts of every step, and the paths of flows where the caller wants them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.tensorized_flow_storage import FinishedFlows, FlowStatus, TensorizedFlowStorage

_COUNTED = {
    "active": FlowStatus.ACTIVE,
    "reached": FlowStatus.REACHED,
    "projected": FlowStatus.PROJECTED,
    "removed": FlowStatus.REMOVED,
}


@dataclass(frozen=True)
class Trajectories:
    """Paths of all flows, detached."""

    position: Tensor  # [T + 1, B, M, 3]; constant once a flow has ended; the last entry is on a plane
    active: Tensor  # bool [T + 1, B, M]: active at the start of step t; entry T: before projection
    displacement: Tensor  # [T, B, M]: length of each move, 0 where not active


@dataclass(frozen=True)
class Counts:
    """Sums over the flows of a batch. The counts of a batch are the sums of the counts of its chunks."""

    by_step: dict[str, Tensor]  # created, active, reached, projected, removed after each step, [T + 1]; entry 0: start
    lost: Tensor  # int64 scalar: flows without a slot at some step, or neither landed nor removed at the end
    distance: Tensor  # scalar: lengths of all moves
    num_moves: Tensor  # int64 scalar: moves of single flows


class History:
    """Records a rollout in tensors on the device, without waiting for it; counts are computed at the end.

    Args:
        storage: the flows, at the start of the rollout.
        keep_paths: whether to keep the path of every flow.
    """

    def __init__(self, storage: TensorizedFlowStorage, keep_paths: bool) -> None:
        self._storage, self._keep_paths = storage, keep_paths
        self._status: list[Tensor] = []
        self._created: list[Tensor] = []
        self._distance: list[Tensor] = []
        self._position: list[Tensor] = []
        self._displacement: list[Tensor] = []
        self._record_flows()

    def record(self, length: Tensor) -> None:
        """Record the flows after a step; `length` [B, M] of the moves, 0 for flows that didn't move."""
        self._record_flows()
        self._distance.append(length.sum())
        if self._keep_paths:
            self._displacement.append(length)

    def counts(self, flows: FinishedFlows) -> Counts:
        """The counts of the rollout; `flows` are the same flows after projection."""
        status, created = torch.stack(self._status), torch.stack(self._created)
        by_step = {"created": created.sum(1)}
        for name, kind in _COUNTED.items():
            by_step[name] = (status == kind).sum((1, 2))
        unaccounted = (created - (status != FlowStatus.FREE).sum(2)).abs().sum()
        ended = (flows.status > FlowStatus.ACTIVE).sum(1)
        return Counts(
            by_step=by_step,
            lost=unaccounted + (flows.created - ended).abs().sum(),
            distance=torch.stack(self._distance).sum() if self._distance else flows.position.new_zeros(()),
            num_moves=by_step["active"][:-1].sum(),
        )

    def trajectories(self, flows: FinishedFlows) -> Trajectories:
        """The paths of the flows, where they are kept; `flows` are the same flows after projection."""
        position = torch.stack(self._position)
        z = position[-1, ..., 2]
        plane = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        position[-1, ..., 2] = torch.where(flows.status == FlowStatus.PROJECTED, plane, z)
        moves = torch.stack(self._displacement) if self._displacement else position.new_zeros(0, *z.shape)
        return Trajectories(position, torch.stack(self._status) == FlowStatus.ACTIVE, moves)

    def _record_flows(self) -> None:
        self._status.append(self._storage.status.clone())
        self._created.append(self._storage.created.clone())
        if self._keep_paths:
            self._position.append(self._storage.state.position.detach())
