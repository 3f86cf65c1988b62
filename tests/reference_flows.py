"""Data classes of the reference: flows as plain objects, and all results of one pass."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def number(value: Tensor | float) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


@dataclass
class Flow:
    """One particle; `status` is active, reached, projected or removed."""

    slot: int
    position: Tensor  # [3]; of a projected flow: where it was before
    energy: Tensor  # [E]
    hidden: Any = None  # of its carrier; None: as at the start
    age: int = 0
    steps: int = 0
    status: str = "active"
    plane: int = 0
    distance: Tensor | None = None
    length: float = 0.0  # of its last move

    @property
    def landed(self) -> bool:
        return self.status in ("reached", "projected")


@dataclass
class Margins:
    """The smallest distance of any decision to its threshold. Rounding can't flip a decision that is far away."""

    smallest: float = math.inf
    name: str = "none"

    def note(self, name: str, distance: Tensor | float) -> None:
        distance = abs(number(distance))
        if distance < self.smallest:
            self.smallest, self.name = distance, name


@dataclass
class Sample:
    """The flows of one sample, and the state of its rules."""

    row: int
    flows: list[Flow]
    sensed: Any = None  # by its neuron, of the input surface
    idle: int = 0
    overflow: int = 0

    def active(self) -> list[Flow]:
        return [flow for flow in self.flows if flow.status == "active"]

    def count(self, *status: str) -> int:
        return sum(flow.status in status for flow in self.flows)


@dataclass
class Snapshot:
    """One flow at the start of a step, or after the last one."""

    position: Tensor  # [3], detached
    active: bool


@dataclass
class ReferenceOutput:
    embedding: Tensor  # [B, D]
    surface: Tensor  # [B, S, E]
    samples: list[Sample]
    by_step: dict[str, list[int]]  # T + 1 entries: created active reached removed projected
    snapshots: list[list[list[Snapshot]]]  # T + 1 x B x flows created so far
    lengths: list[float]  # of every move
    hit_cells: int  # cells with any share of a landing, over all samples
    margins: Margins
    events: Counter[str]  # event -> how often it happened

    @property
    def overflow(self) -> int:
        return sum(sample.overflow for sample in self.samples)

    @property
    def needed(self) -> int:
        return max(len(sample.flows) + sample.overflow for sample in self.samples)

    def landings(self) -> Iterator[tuple[int, Flow]]:
        """(sample, flow) of every landing."""
        for index, sample in enumerate(self.samples):
            for flow in sample.flows:
                if flow.landed:
                    yield index, flow

    def statistics(self) -> dict[str, float]:
        """Shares of the landings, means over landings and moves (0 where there are none), counts."""
        landings = [flow for _, flow in self.landings()]
        count, moves = max(1, len(landings)), max(1, len(self.lengths))
        created = sum(len(sample.flows) for sample in self.samples)
        batch, num_cells = self.surface.shape[:2]
        energy = torch.stack([flow.energy.detach() for flow in landings]) if landings else torch.zeros(1)
        return {
            "share_z0": sum(flow.plane == 0 for flow in landings) / count,
            "share_zdepth": sum(flow.plane == 1 for flow in landings) / count,
            "share_projected": sum(flow.status == "projected" for flow in landings) / count,
            "steps": sum(flow.steps for flow in landings) / count,
            "created": created / batch,
            "landed": len(landings) / batch,
            "removed": sum(sample.count("removed") for sample in self.samples) / batch,
            "spawned": created / batch - num_cells,
            "overflow": self.overflow / batch,
            "coverage": self.hit_cells / (batch * num_cells),
            "displacement": sum(self.lengths) / moves,
            "energy_mean": float(energy.mean()),
            "energy_std": float(energy.std(unbiased=False)),
            "active_share": len(self.lengths) / (created * max(1, len(self.snapshots) - 1)),
        }
