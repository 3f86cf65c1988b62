"""Both sides of `benchmark=report` at the end of one batch: the earlier method and the present one."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from energy_flow.core.energy_lattice import Deposits, EnergyLattice
from energy_flow.core.flow_processor import FlowProcessor
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
from energy_flow_benchmarks.measure import Effort, Prepared, Work, measure, peak_memory, ready, require_near
from energy_flow_benchmarks.workload import settings_of

BEFORE, NOW = "before", "now"
TIME_CASES = ("collection", "aggregation", "cleanup", "data processing", "end of batch")
MEMORY = "peak memory"
DEPTH = 40
TOLERANCE = 1e-5  # float32 sums over the few members of a group, in another order

Groups = dict[before.Cell, list[before.ListFlow]]


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
        for case, works in self.cases().items():
            self.check(case, *(ready(work)() for work in works))
            builds = {side: lambda work=work: work for side, work in zip((BEFORE, NOW), works, strict=True)}
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

    def cases(self) -> dict[str, tuple[Work, Work]]:
        """Return the work of every case: by the earlier method, by the present one."""
        flows, moving = self.flows, under_way(self.flows)
        listed, tensors = as_list(flows), as_tensors(flows)
        works: tuple[tuple[Work, Work], ...] = (
            (partial(self._collect_before, listed), partial(self._collect_now, tensors)),
            (
                partial(self._aggregate_before, self._collect_before(listed)),
                partial(self._aggregate_now, self._collect_now(tensors)),
            ),
            (
                Prepared(lambda: as_list(flows), lambda listed: before.cleanup(listed, self.device)),
                Prepared(self._processor, lambda processor: processor.cleanup_memory_safe()),
            ),
            (partial(before.select_active, as_list(moving)), partial(_select_active, as_tensors(moving))),
            (
                Prepared(lambda: as_list(flows), self._end_before),
                Prepared(lambda: (as_tensors(flows), self._processor()), lambda made: self._end_now(*made)),
            ),
        )
        return dict(zip(TIME_CASES, works, strict=True))

    def check(self, case: str, old: Any, new: Any) -> None:
        """Compare the results of both sides.

        Raises:
            RuntimeError: they differ.
        """
        if case == "cleanup":
            if old or not new:
                raise RuntimeError(f"cleanup: {old} flows left before, {new} bytes freed now")
            return
        if case == "collection":  # energies are random, so groups with other members have other averages
            old, new = self._aggregate_before(old), self._aggregate_now(new)
        elif case == "data processing":
            old, new = torch.cat(old, dim=1), torch.cat(new, dim=1)
        require_near(f"{case}: now", old, new, TOLERANCE, scale=1.0)

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
