"""`benchmark=report`: the owner's performance analysis, item by item, with before and now measured side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor

from energy_flow.core.energy_lattice import Deposits, EnergyLattice, LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.settings import Settings
from energy_flow_benchmarks import before
from energy_flow_benchmarks.answers import MEMORY, TIME_CASES, answers_grid, impact_grid
from energy_flow_benchmarks.curves import loss_curves, training_step
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Row, rows_of
from energy_flow_benchmarks.flows import (
    DEPTH,
    FlowTensors,
    TensorFlows,
    after_a_batch,
    as_list,
    as_tensors,
    bare_lattice,
    collect,
    finished_flows,
    lattice_settings,
    plane_of,
    select_active,
    under_way,
)
from energy_flow_benchmarks.measure import Prepared, Work, compare, peak_memory

BEFORE, NOW = "before", "now"
RATIO = "; ratio to before"
TOLERANCE = 1e-5  # float32 sums over the few members of a group, in another order
CURVE_LIMIT = 1e-8  # float64 rounding, amplified by as many optimiser steps as there are

TITLES = {
    "collection": "completed flows, cells",
    "aggregation": "softmax per cell",
    "cleanup": "letting flows go",
    "data processing": "active flows",
    "end of batch": "all of it",
}

Count = Annotated[int, Field(ge=1)]
Ascending = Annotated[list[Count], Field(min_length=1)]


class ReportSettings(Settings):
    """Config group `benchmark`, option `report`."""

    name: Literal["report"]
    flows: Ascending
    samples: Count
    energy_dim: Count
    hidden_size: Count
    training_flows: Ascending
    curve_steps: Count
    repeats: Count
    min_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _whole_samples(self) -> Self:
        for key, values, samples in (
            ("flows", self.flows, self.samples),
            ("training_flows", self.training_flows, 2),
        ):
            for index, value in enumerate(values):
                if value % samples:
                    raise ValueError(
                        f"benchmark.{key}[{index}] = {value}: must be a multiple of {samples}, the samples of its "
                        f"batch; set it to {value // samples * samples or samples}"
                    )
            if sorted(set(values)) != values:
                raise ValueError(f"benchmark.{key} = {values}: must be ascending, every size once; sort it")
        return self


def run(settings: ReportSettings, device: torch.device, seed: int, say: Callable[[str], None]) -> Findings:
    """Measure both sides at every size, on the same flows and with equal results.

    Raises:
        RuntimeError: the two sides gave different results.
    """
    rows: list[Row] = []
    for num_flows in settings.flows:
        say(f"{num_flows:,} flows")
        rows += EndOfBatch(settings, num_flows, device, seed).rows()
    for num_flows in settings.training_flows:
        say(f"training steps of {num_flows:,} flows")
        rows += _training_rows(settings, num_flows, device, seed)
    say(f"{settings.curve_steps} training steps of both sides")
    curve_rows, difference = _curve_rows(settings, device, seed)
    return Findings(
        rows=rows + curve_rows,
        grids=[impact_grid(rows, difference), answers_grid(rows, difference)],
        notes=[
            f"flows: {settings.samples} samples per batch, energy of {settings.energy_dim}, memory of "
            f"{settings.hidden_size} numbers, float32; every case works on the same flows on both sides, and their "
            "results are equal (checked)",
            "before: one Python object per flow, loops, dictionaries, .item(), one stack per group; now: tensors",
            "peak memory: holding the flows and ending the batch, graph included; "
            + ("the allocator's bytes" if device.type == "cuda" else "growth of the process's resident memory"),
            f"loss curves of {settings.curve_steps} training steps (float64, 32 flows) differ by at most "
            f"{difference:.1e}",
        ],
    )


def picture(rows: list[Row]) -> Figure:
    """Before and now of every case against the number of flows."""
    panels = [Panel(case, f"{case}: {TITLES[case]}", SECONDS, "flows in the batch") for case in TIME_CASES]
    panels.append(Panel(MEMORY, "peak memory: flows and end of batch", BYTES, "flows in the batch"))
    return figure_of_panels(rows, panels, "The end of a batch: flows as Python objects (before), as tensors (now)")


@dataclass(frozen=True)
class _Pair:
    """One case, done by both sides; `check` raises if what they return isn't equal."""

    before: Work
    now: Work
    check: Callable[[Any, Any], None]


class EndOfBatch:
    """What happens to the flows of one batch at its end, by both sides.

    Args:
        settings: sizes.
        num_flows: of the batch.
    """

    def __init__(self, settings: ReportSettings, num_flows: int, device: torch.device, seed: int) -> None:
        self.settings, self.num_flows, self.device = settings, num_flows, device
        self.width, self.height = plane_of(num_flows // settings.samples)
        self.lattice_settings: LatticeSettings = lattice_settings(self.width, self.height, depth=DEPTH)
        self.lattice: EnergyLattice = bare_lattice(self.lattice_settings, settings.energy_dim)
        self.flows: FlowTensors = finished_flows(
            settings.samples, self.lattice_settings, settings.energy_dim, settings.hidden_size, device, seed
        )

    def rows(self) -> list[Row]:
        """Both sides of every case, measured after their results were compared."""
        rows: list[Row] = []
        for case, pair in self.cases().items():
            pair.check(_run_once(pair.before), _run_once(pair.now))
            seconds = compare(
                {BEFORE: pair.before, NOW: pair.now},
                self.device,
                repeats=self.settings.repeats,
                min_seconds=self.settings.min_seconds,
            )
            rows += rows_of("report", case + RATIO, self.num_flows, dict(seconds), BEFORE)
        return rows + self._memory_rows()

    def cases(self) -> dict[str, _Pair]:
        listed, tensors = as_list(self.flows), as_tensors(self.flows)
        moving = under_way(self.flows)
        listed_moving, tensors_moving = as_list(moving), as_tensors(moving)
        groups, deposits = self._collect_before(listed), self._collect_now(tensors)
        return {
            "collection": _Pair(
                lambda: self._collect_before(listed),
                lambda: self._collect_now(tensors),
                lambda old, new: self._same_cells(listed, old, new),
            ),
            "aggregation": _Pair(
                lambda: self._aggregate_before(groups),
                lambda: self._aggregate_now(deposits),
                lambda old, new: require_equal("aggregation", old, new),
            ),
            "cleanup": _Pair(
                Prepared(lambda: as_list(self.flows), lambda flows: before.cleanup(flows, self.device)),
                Prepared(self._batch_done, lambda processor: processor.cleanup_memory_safe()),
                self._both_empty,
            ),
            "data processing": _Pair(
                lambda: before.select_active(listed_moving),
                lambda: select_active(tensors_moving),
                _same_active,
            ),
            "end of batch": _Pair(
                Prepared(lambda: as_list(self.flows), self._end_before),
                Prepared(lambda: (as_tensors(self.flows), self._batch_done()), lambda made: self._end_now(*made)),
                lambda old, new: require_equal("end of batch", old, new),
            ),
        }

    def _memory_rows(self) -> list[Row]:
        # The processor's own last output is made outside: in training it shares memory with the landings inside.
        sides: dict[str, Work] = {
            BEFORE: lambda: self._end_before(as_list(self.flows)),
            NOW: Prepared(self._batch_done, lambda processor: self._end_now(as_tensors(self.flows), processor)),
        }
        peaks = {side: peak_memory(work, self.device) for side, work in sides.items()}
        return rows_of("report", "peak memory", self.num_flows, dict.fromkeys(sides), peaks=peaks)

    def _collect_before(self, flows: before.Flows) -> dict[before.Cell, list[before.ListFlow]]:
        return before.collect(flows, self.width, self.height)

    def _collect_now(self, flows: TensorFlows) -> Deposits:
        return collect(self.lattice, flows)

    def _aggregate_before(self, groups: dict[before.Cell, list[before.ListFlow]]) -> Tensor:
        empty = torch.zeros(self.settings.energy_dim, device=self.device)
        return before.aggregate(groups, self.settings.samples, self.width, self.height, empty)

    def _aggregate_now(self, deposits: Deposits) -> Tensor:
        return self.lattice.aggregate(deposits, self.settings.samples)[0]

    def _end_before(self, flows: before.Flows) -> Tensor:
        surface = self._aggregate_before(self._collect_before(flows))
        before.cleanup(flows, self.device)
        return surface

    def _end_now(self, flows: TensorFlows, processor: FlowProcessor) -> Tensor:
        surface = self._aggregate_now(self._collect_now(flows))
        processor.cleanup_memory_safe()
        return surface

    def _batch_done(self) -> FlowProcessor:
        return after_a_batch(self.settings.samples, self.lattice_settings, self.settings.energy_dim, self.device)

    def _same_cells(
        self, flows: before.Flows, groups: dict[before.Cell, list[before.ListFlow]], deposits: Deposits
    ) -> None:
        cell_of = {id(flow): cell for cell, members in groups.items() for flow in members}
        keys = torch.full((len(flows),), -1)
        for index, flow in enumerate(flows.values()):
            if id(flow) in cell_of:
                sample, x, y = cell_of[id(flow)]
                keys[index] = (sample * self.height + y) * self.width + x
        found = torch.where(deposits.weights[:, 0] > 0, deposits.keys[:, 0], -1)
        if not torch.equal(keys, found.cpu()):
            raise RuntimeError("collection: the two sides found different landings or cells")

    def _both_empty(self, old: None, new: int) -> None:
        flows, processor = as_list(self.flows), self._batch_done()
        before.cleanup(flows, self.device)
        processor.cleanup_memory_safe()
        if flows or processor.last_output is not None or new == 0:
            raise RuntimeError(f"cleanup: {len(flows)} flows left before, {new} bytes freed now")


def _same_active(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(old, new, strict=True):
        require_equal("data processing", left, right, tolerance=0.0)


def require_equal(case: str, old: Tensor, new: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises RuntimeError unless both have one shape and differ by no more than `tolerance`."""
    if old.shape != new.shape:
        raise RuntimeError(f"{case}: shape {list(old.shape)} before, {list(new.shape)} now")
    difference = float((old - new).detach().abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{case}: before and now differ by {difference:.3g}, allowed {tolerance:.3g}")


def _run_once(work: Work) -> Any:
    return work.run(work.setup()) if isinstance(work, Prepared) else work()


def _training_rows(settings: ReportSettings, num_flows: int, device: torch.device, seed: int) -> list[Row]:
    """Whole training steps: forward, backward, optimiser."""
    width, height = plane_of(num_flows // 2)
    lattice = lattice_settings(width, height, depth=6)
    sides = {
        side: training_step(side, lattice, settings.energy_dim, settings.hidden_size, device, seed)
        for side in (BEFORE, NOW)
    }
    losses = {side: step() for side, step in sides.items()}
    require_equal("training step", losses[BEFORE], losses[NOW])
    seconds = compare(sides, device, repeats=settings.repeats, min_seconds=settings.min_seconds, warmup=1)
    peaks = {side: peak_memory(step, device) for side, step in sides.items()}
    return rows_of("report", "training step" + RATIO, num_flows, dict(seconds), BEFORE, peaks)


def _curve_rows(settings: ReportSettings, device: torch.device, seed: int) -> tuple[list[Row], float]:
    """The rows of the two loss curves, and the largest difference between them."""
    curves, seconds = loss_curves((BEFORE, NOW), settings.curve_steps, device, seed)
    difference = float((curves[BEFORE] - curves[NOW]).abs().max())
    if not difference <= CURVE_LIMIT:
        raise RuntimeError(
            f"loss curves of {settings.curve_steps} training steps differ by {difference:.3g}, allowed {CURVE_LIMIT:g}"
        )
    return rows_of("report", f"loss curve of {settings.curve_steps} steps{RATIO}", 32, seconds, BEFORE), difference
