"""`benchmark=memory`: peak memory and time of a training step against the number of flows, whole and in chunks."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from energy_flow.settings import Settings
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Row, find, grid_by_size, rows_of, sizes_of
from energy_flow_benchmarks.measure import Build, Count, Effort, measure
from energy_flow_benchmarks.output import in_bytes
from energy_flow_benchmarks.workload import SHORT, Dtype, Product, SizeSettings, Workload

FAST, LEAN, NO_STEPS = "fast", "lean", "no steps: maps and landings"
WHOLE, AUTO = "whole batch", "chunk auto"


class SweepSettings(SizeSettings):
    """A size at several batches."""

    batches: Annotated[list[Count], Field(min_length=1)]
    chunk: Count


class MemoryOnDevice(Effort):
    """The measurements on one kind of device."""

    sweeps: Annotated[list[SweepSettings], Field(min_length=1)]
    dtype: Dtype
    product: Count


class MemorySettings(Settings):
    """Config group `benchmark`, option `memory`."""

    name: Literal["memory"]
    dim: Count
    cpu: MemoryOnDevice
    cuda: MemoryOnDevice


def run(settings: MemorySettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Measure all sweeps. A variant that runs out of memory has rows without seconds, and a note."""
    own: MemoryOnDevice = getattr(settings, device.type)
    rows: list[Row] = []
    grids, notes = [], []
    for sweep in own.sweeps:
        workload = Workload.read(sweep, settings.dim, device, seed).where_no_flow_ends()
        found: list[Row] = []
        for batch in sorted(set(sweep.batches)):
            progress(f"{sweep.size}, {workload.num_flows(batch):,} flows")
            found += _measure(workload, sweep, batch, own)
        rows += found
        grids.append(flatness_grid(found, sweep))
        notes += [
            f"{sweep.size}, {row.size:,} flows, {row.variant}: out of memory" for row in found if row.seconds is None
        ]
    notes.append(
        f"a step is forward and backward, {SHORT[own.dtype]}; fast: gates are kept; lean: gates are computed again in "
        f"the backward pass; share: of the rate of a product {own.product}³, which alternates with the steps"
    )
    return Findings(rows, grids, notes)


def picture(rows: list[Row]) -> Figure:
    """Draw peak memory and time of every sweep against the number of flows."""
    panels = []
    for case in dict.fromkeys(row.case for row in rows):
        size = case.split(";")[0]
        panels.append(Panel(case, f"{size}: peak memory", BYTES, "flows"))
        panels.append(Panel(case, f"{size}: time", SECONDS, "flows"))
    return figure_of_panels(rows, panels, "A training step: memory and time against the number of flows", columns=2)


def chunked(kind: str) -> str:
    """Name the variant that runs a fixed number of samples at a time; the case has the number."""
    return f"{kind}, in chunks"


def variants(sweep: SweepSettings, batch: int) -> dict[str, dict[str, Any]]:
    """Return rollout settings by variant. Only the largest batch has the automatic chunk, where it matters."""
    kinds = {FAST: False, LEAN: True}
    found: dict[str, dict[str, Any]] = {
        f"{kind}, {WHOLE}": {"recompute": lean, "chunk": None} for kind, lean in kinds.items()
    }
    found |= {chunked(kind): {"recompute": lean, "chunk": sweep.chunk} for kind, lean in kinds.items()}
    if batch == max(sweep.batches):
        found[f"{FAST}, {AUTO}"] = {"recompute": False, "chunk": "auto"}
    return found


def _measure(workload: Workload, sweep: SweepSettings, batch: int, own: MemoryOnDevice) -> list[Row]:
    builds: dict[str, Build] = {
        name: workload.step(batch, own.dtype, engine="tape", **rollout)
        for name, rollout in variants(sweep, batch).items()
    }
    builds[NO_STEPS] = workload.without_steps().step(batch, own.dtype)
    square = Product(own.product, own.product, own.product, own.dtype)
    builds[square.name] = lambda: square.build(workload.device)
    found = measure(builds, workload.device, own)
    least = workload.arithmetic(batch) / found.pop(square.name).rate(square.flops)
    case = f"{sweep.size}; chunks of {sweep.chunk} samples"
    rows = rows_of("memory", case, workload.num_flows(batch), found, f"{FAST}, {WHOLE}", least)
    return [dataclasses.replace(row, share=None) if row.variant == NO_STEPS else row for row in rows]


def flatness_grid(rows: list[Row], sweep: SweepSettings) -> Grid:
    """Show the peak memory of a fixed chunk, less the part that grows with the batch by nature: maps and landings."""

    def beyond(kind: str, size: int) -> str:
        own, base = (find(rows, sweep.size, size, name).peak_bytes for name in (chunked(kind), NO_STEPS))
        return "-" if own is None or base is None else in_bytes(own - base)

    sizes = sizes_of(rows, sweep.size)
    title = f"{sweep.size}: peak memory in chunks of {sweep.chunk} samples, beyond maps and landings"
    lines = {chunked(kind): [beyond(kind, size) for size in sizes] for kind in (FAST, LEAN)}
    return grid_by_size(title, "variant", sizes, "flows", lines)
