"""Both sides of `benchmark=report` at the end of one batch: the earlier method and the present one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from energy_flow.core.energy_lattice import Deposits, EnergyLattice
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow.core.tensorized_flow_storage import FlowStatus
from energy_flow_benchmarks import before
from energy_flow_benchmarks.findings import Measured, Row, rows_of
from energy_flow_benchmarks.flows import (
    EMBEDDING_DIM,
    TensorFlows,
    as_list,
    as_tensors,
    finished_flows,
    plane_of,
    report_lattice,
    under_way,
)
from energy_flow_benchmarks.measure import Effort, Prepared, Work, measure, peak_memory, ready, require_within
from energy_flow_benchmarks.workload import settings_of

BEFORE, NOW = "before", "now"
TIME_CASES = ("collection", "aggregation", "cleanup", "data processing", "end of batch")
MEMORY = "peak memory"
DEPTH = 40
TOLERANCE = 1e-5  # float32 sums over the few members of a group, in another order

Groups = dict[before.Cell, list[before.ListFlow]]


@dataclass(frozen=True)
class Pair:
    """One case by both sides; `check` raises RuntimeError if their results differ."""

    before: Work
    now: Work
    check: Callable[[Any, Any], None]


class EndOfBatch:
    """The work at the end of a batch, by both sides. `num_flows` is a multiple of `samples`."""

    def __init__(
        self, num_flows: int, samples: int, energy_dim: int, hidden_size: int, device: torch.device, seed: int
    ) -> None:
        self.num_flows, self.samples, self.energy_dim, self.device = num_flows, samples, energy_dim, device
        self.settings = report_lattice(*plane_of(num_flows // samples), depth=DEPTH)
        self.lattice = EnergyLattice(self.settings, energy_dim, nn.Identity())  # for the collection: it has no map out
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
        flows, moving = self.flows, under_way(self.flows)
        listed, tensors = as_list(flows), as_tensors(flows)
        pairs = (
            Pair(
                partial(self._collect_before, listed),
                partial(self._collect_now, tensors),
                partial(self._require_same_cells, listed),
            ),
            Pair(
                partial(self._aggregate_before, self._collect_before(listed)),
                partial(self._aggregate_now, self._collect_now(tensors)),
                partial(require_within, "aggregation: now", limit=TOLERANCE),
            ),
            Pair(
                Prepared(lambda: as_list(flows), lambda listed: before.cleanup(listed, self.device)),
                Prepared(self._processor, lambda processor: (processor.cleanup_memory_safe(), processor.last_output)),
                _require_both_empty,
            ),
            Pair(
                partial(before.select_active, as_list(moving)),
                partial(_select_active, as_tensors(moving)),
                _require_same_active,
            ),
            Pair(
                Prepared(lambda: as_list(flows), self._end_before),
                Prepared(lambda: (as_tensors(flows), self._processor()), lambda made: self._end_now(*made)),
                partial(require_within, "end of batch: now", limit=TOLERANCE),
            ),
        )
        return dict(zip(TIME_CASES, pairs, strict=True))

    def _require_same_cells(self, flows: before.Flows, groups: Groups, deposits: Deposits) -> None:
        """Compare the cell of every flow; -1: it did not land."""
        cell_of = {id(flow): cell for cell, members in groups.items() for flow in members}
        cells = torch.full((len(flows),), -1)
        for index, flow in enumerate(flows.values()):
            if id(flow) in cell_of:
                sample, x, y = cell_of[id(flow)]
                cells[index] = (sample * self.settings.height + y) * self.settings.width + x
        found = torch.where(deposits.weights[:, 0] > 0, deposits.keys[:, 0], -1)
        if not torch.equal(cells, found.cpu()):
            raise RuntimeError("collection: the two sides found different landings or cells")

    def _collect_before(self, flows: before.Flows) -> Groups:
        return before.collect(flows, self.settings.width, self.settings.height)

    def _collect_now(self, flows: TensorFlows) -> Deposits:
        return self.lattice.collect(self.lattice.landings(flows.storage.finished()))

    def _aggregate_before(self, groups: Groups) -> Tensor:
        empty = torch.zeros(self.energy_dim, device=self.device)
        return before.aggregate(groups, self.samples, self.settings.width, self.settings.height, empty)

    def _aggregate_now(self, deposits: Deposits) -> Tensor:
        return self.lattice.aggregate(deposits, self.samples)[0]

    def _end_before(self, flows: before.Flows) -> Tensor:
        surface = self._aggregate_before(self._collect_before(flows))
        before.cleanup(flows, self.device)
        return surface

    def _end_now(self, flows: TensorFlows, processor: FlowProcessor) -> Tensor:
        surface = self._aggregate_now(self._collect_now(flows))
        processor.cleanup_memory_safe()
        return surface

    def _processor(self) -> FlowProcessor:
        """Return a processor that has just run a batch of as many flows, and still holds its output."""
        one_step = self.settings.model_copy(update={"max_steps": 1})
        model = settings_of(ModelSettings, "model", {"energy_dim": self.energy_dim, "hidden_size": 4})
        processor = FlowProcessor(EMBEDDING_DIM, one_step, model, seed=0).to(self.device)
        with torch.no_grad():
            processor(torch.randn(self.samples, EMBEDDING_DIM, device=self.device))
        return processor


def _select_active(flows: TensorFlows) -> tuple[Tensor, Tensor]:
    """Return positions [A, 3] and energies [A, E] of the active flows. The rollout itself needs the mask alone."""
    active = flows.storage.status == FlowStatus.ACTIVE
    return flows.storage.state.position[active], flows.storage.state.energy[active]


def _require_both_empty(left: int, now: tuple[int, FlowOutput | None]) -> None:
    freed, output = now
    if left or not freed or output is not None:
        kept = "no output" if output is None else "the last output"
        raise RuntimeError(f"cleanup: {left} flows left before; {freed} bytes freed and {kept} kept now")


def _require_same_active(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    for name, left, right in zip(("positions", "energies"), old, new, strict=True):
        require_within(f"data processing: {name}", left, right, limit=0.0)
