"""Both sides of `benchmark=report` at the end of one batch: the earlier method and the present one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from energy_flow.core.energy_lattice import Deposits
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow_benchmarks import before
from energy_flow_benchmarks.findings import Measured, Row, rows_of
from energy_flow_benchmarks.flows import (
    DEPTH,
    TensorFlows,
    as_list,
    as_tensors,
    bare_lattice,
    collect,
    finished_flows,
    plane_of,
    processor_after_batch,
    report_lattice,
    select_active,
    under_way,
)
from energy_flow_benchmarks.measure import Effort, Prepared, Work, measure, peak_memory, ready

BEFORE, NOW = "before", "now"
TIME_CASES = ("collection", "aggregation", "cleanup", "data processing", "end of batch")
MEMORY = "peak memory"
TOLERANCE = 1e-5  # float32 sums over the few members of a group, in another order

Groups = dict[before.Cell, list[before.ListFlow]]


@dataclass(frozen=True)
class Pair:
    """One case by both sides; `check` raises RuntimeError if their results differ."""

    before: Work
    now: Work
    check: Callable[[Any, Any], None]


class EndOfBatch:
    """The work at the end of a batch, by both sides.

    Args:
        num_flows: of the batch, a multiple of `samples`.
        samples: of the batch.
        energy_dim, hidden_size: of every flow.
        device: where the flows are.
        seed: of the flows.
    """

    def __init__(
        self, num_flows: int, samples: int, energy_dim: int, hidden_size: int, device: torch.device, seed: int
    ) -> None:
        self.num_flows, self.samples, self.energy_dim, self.device = num_flows, samples, energy_dim, device
        self.width, self.height = plane_of(num_flows // samples)
        self.settings = report_lattice(self.width, self.height, depth=DEPTH)
        self.lattice = bare_lattice(self.settings, energy_dim)
        self.flows = finished_flows(samples, self.settings, energy_dim, hidden_size, device, seed)

    def rows(self, effort: Effort) -> list[Row]:
        """Compare the results of both sides, then measure them.

        Raises:
            RuntimeError: the results differ.
        """
        rows: list[Row] = []
        for case, pair in self.cases().items():
            pair.check(ready(pair.before)(), ready(pair.now)())
            builds = {side: lambda work=work: work for side, work in ((BEFORE, pair.before), (NOW, pair.now))}
            found = measure(builds, self.device, effort)
            times = {side: Measured(one.seconds) for side, one in found.items()}
            rows += rows_of("report", case, self.num_flows, times, BEFORE)
        # The flows are made inside the measurement, the processor outside: in training it shares memory with them.
        sides: dict[str, Work] = {
            BEFORE: lambda: self._end_before(as_list(self.flows)),
            NOW: Prepared(self._processor, lambda processor: self._end_now(as_tensors(self.flows), processor)),
        }
        peaks = {side: Measured(None, peak_memory(work, self.device)) for side, work in sides.items()}
        return rows + rows_of("report", MEMORY, self.num_flows, peaks)

    def cases(self) -> dict[str, Pair]:
        """Return the work of every case."""
        listed, tensors = as_list(self.flows), as_tensors(self.flows)
        moving = under_way(self.flows)
        listed_moving, tensors_moving = as_list(moving), as_tensors(moving)
        groups, deposits = self._collect_before(listed), collect(self.lattice, tensors)
        pairs = (
            Pair(
                lambda: self._collect_before(listed),
                lambda: collect(self.lattice, tensors),
                lambda old, new: self._require_same_cells(listed, old, new),
            ),
            Pair(
                lambda: self._aggregate_before(groups),
                lambda: self._aggregate_now(deposits),
                lambda old, new: require_equal("aggregation", old, new),
            ),
            Pair(
                Prepared(lambda: as_list(self.flows), lambda flows: before.cleanup(flows, self.device)),
                Prepared(self._processor, lambda processor: processor.cleanup_memory_safe()),
                self._require_both_empty,
            ),
            Pair(
                lambda: before.select_active(listed_moving),
                lambda: select_active(tensors_moving),
                _require_same_active,
            ),
            Pair(
                Prepared(lambda: as_list(self.flows), self._end_before),
                Prepared(lambda: (as_tensors(self.flows), self._processor()), lambda made: self._end_now(*made)),
                lambda old, new: require_equal("end of batch", old, new),
            ),
        )
        return dict(zip(TIME_CASES, pairs, strict=True))

    def _collect_before(self, flows: before.Flows) -> Groups:
        return before.collect(flows, self.width, self.height)

    def _aggregate_before(self, groups: Groups) -> Tensor:
        empty = torch.zeros(self.energy_dim, device=self.device)
        return before.aggregate(groups, self.samples, self.width, self.height, empty)

    def _aggregate_now(self, deposits: Deposits) -> Tensor:
        return self.lattice.aggregate(deposits, self.samples)[0]

    def _end_before(self, flows: before.Flows) -> Tensor:
        surface = self._aggregate_before(self._collect_before(flows))
        before.cleanup(flows, self.device)
        return surface

    def _end_now(self, flows: TensorFlows, processor: FlowProcessor) -> Tensor:
        surface = self._aggregate_now(collect(self.lattice, flows))
        processor.cleanup_memory_safe()
        return surface

    def _processor(self) -> FlowProcessor:
        return processor_after_batch(self.samples, self.settings, self.energy_dim, self.device)

    def _require_same_cells(self, flows: before.Flows, groups: Groups, deposits: Deposits) -> None:
        cell_of = {id(flow): cell for cell, members in groups.items() for flow in members}
        keys = torch.full((len(flows),), -1)
        for index, flow in enumerate(flows.values()):
            if id(flow) in cell_of:
                sample, x, y = cell_of[id(flow)]
                keys[index] = (sample * self.height + y) * self.width + x
        found = torch.where(deposits.weights[:, 0] > 0, deposits.keys[:, 0], -1)
        if not torch.equal(keys, found.cpu()):
            raise RuntimeError("collection: the two sides found different landings or cells")

    def _require_both_empty(self, old: None, freed: int) -> None:
        flows, processor = as_list(self.flows), self._processor()
        before.cleanup(flows, self.device)
        processor.cleanup_memory_safe()
        if flows or processor.last_output is not None or freed == 0:
            raise RuntimeError(f"cleanup: {len(flows)} flows left before, {freed} bytes freed now")


def require_equal(case: str, old: Tensor, new: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare the results of both sides.

    Raises:
        RuntimeError: their shapes differ, or their values differ by more than `tolerance`.
    """
    if old.shape != new.shape:
        raise RuntimeError(f"{case}: shape {list(old.shape)} before, {list(new.shape)} now")
    difference = float((old - new).detach().abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{case}: before and now differ by {difference:.3g}, allowed {tolerance:.3g}")


def _require_same_active(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(old, new, strict=True):
        require_equal("data processing", left, right, tolerance=0.0)
