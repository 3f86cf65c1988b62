"""`benchmark=memory`: peak memory and seconds of a training step against the number of flows, whole and in chunks."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from energy_flow.settings import Settings
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Row, find, sizes
from energy_flow_benchmarks.output import BYTE_UNITS, in_units
from energy_flow_benchmarks.turns import Build, measure_in_turns
from energy_flow_benchmarks.workload import (
    SHORT,
    Count,
    Dtype,
    Seconds,
    SizeSettings,
    Workload,
    product,
    product_rate,
    step_of,
)

FAST, LEAN, NO_STEPS = "fast", "lean", "no steps: maps and landings"
WHOLE, AUTO = "whole batch", "chunk auto"
PRODUCT = "product"


class SweepSettings(SizeSettings):
    """A size at several batches."""

    batches: Annotated[list[Count], Field(min_length=1)]
    chunk: Count


class MemoryOnDevice(Settings):
    """What is measured on a kind of device."""

    sweeps: Annotated[list[SweepSettings], Field(min_length=1)]
    dtype: Dtype
    product: Count
    repeats: Count
    min_seconds: Seconds


class MemorySettings(Settings):
    """Config group `benchmark`, option `memory`."""

    name: Literal["memory"]
    dim: Count
    cpu: MemoryOnDevice
    cuda: MemoryOnDevice


def run(settings: MemorySettings, device: torch.device, seed: int, say: Callable[[str], None]) -> Findings:
    """All sweeps. A variant that ran out of memory has rows without seconds, and a note."""
    own = settings.cuda if device.type == "cuda" else settings.cpu
    rows: list[Row] = []
    grids, notes = [], []
    for sweep in own.sweeps:
        workload = Workload.read(sweep, settings.dim, device, seed).where_no_flow_ends()
        found: list[Row] = []
        for batch in sorted(set(sweep.batches)):
            say(f"{sweep.size}, {workload.num_flows(batch):,} flows")
            found += _measure(workload, sweep, batch, own)
        rows += found
        grids.append(flatness_grid(found, sweep))
        notes += [
            f"{row.case.split(';')[0]}, {row.size:,} flows, {row.variant}: out of memory"
            for row in found
            if row.seconds is None
        ]
    notes.append(
        f"a step is forward and backward, {SHORT[own.dtype]}; fast: gates are kept; lean: gates are computed again in "
        f"the backward pass; share: of the rate of a product {own.product}³, timed in turn with the steps"
    )
    return Findings(rows, grids, notes)


def picture(rows: list[Row]) -> Figure:
    """Peak memory and seconds of every sweep against the number of flows."""
    panels = []
    for case in dict.fromkeys(row.case for row in rows):
        size = case.split(";")[0]
        panels.append(Panel(case, f"{size}: peak memory", BYTES, "flows"))
        panels.append(Panel(case, f"{size}: seconds", SECONDS, "flows"))
    return figure_of_panels(rows, panels, "A training step: memory and time against the number of flows", columns=2)


def chunked(kind: str) -> str:
    """Name of a variant that runs a fixed number of samples at a time; the case says how many."""
    return f"{kind}, in chunks"


def variants(sweep: SweepSettings, batch: int) -> dict[str, dict[str, Any]]:
    """Settings of the rollout by name; the automatic chunk for the largest batch alone, where it matters."""
    ways = {FAST: False, LEAN: True}
    wanted: dict[str, dict[str, Any]] = {
        f"{kind}, {WHOLE}": {"recompute": lean, "chunk": None} for kind, lean in ways.items()
    }
    wanted |= {chunked(kind): {"recompute": lean, "chunk": sweep.chunk} for kind, lean in ways.items()}
    if batch == max(sweep.batches):
        wanted[f"{FAST}, {AUTO}"] = {"recompute": False, "chunk": "auto"}
    return wanted


def _measure(workload: Workload, sweep: SweepSettings, batch: int, own: MemoryOnDevice) -> list[Row]:
    data = workload.batch(batch)

    def built(of: Workload, **rollout: Any) -> Build:
        return lambda: step_of(of.processor(**rollout), *data, own.dtype).run

    builds = {name: built(workload, engine="tape", **rollout) for name, rollout in variants(sweep, batch).items()}
    builds[NO_STEPS] = built(workload.without_steps())
    shape = (own.product,) * 3
    builds[PRODUCT] = product(shape, own.dtype, workload.device)
    found = measure_in_turns(builds, workload.device, repeats=own.repeats, min_seconds=own.min_seconds)
    baseline = found[f"{FAST}, {WHOLE}"].seconds
    rate = product_rate(shape, found.pop(PRODUCT).seconds or math.inf)
    least, flows = workload.arithmetic(batch) / rate, workload.num_flows(batch)
    rows = []
    for name, one in found.items():
        ratio = baseline / one.seconds if baseline and one.seconds else None
        share = least / one.seconds if one.seconds and name != NO_STEPS else None
        case = f"{sweep.size}; chunks of {sweep.chunk} samples; ratio to {FAST}, {WHOLE}"
        rows.append(Row("memory", case, flows, name, one.seconds, one.peak_bytes, ratio, share))
    return rows


def flatness_grid(rows: list[Row], sweep: SweepSettings) -> Grid:
    """At a fixed chunk: peak memory beyond that of maps and landings, which grow with the batch as they must."""
    columns = sizes(rows, sweep.size)
    lines = []
    for kind in (FAST, LEAN):
        cells = []
        for size in columns:
            own, base = (find(rows, sweep.size, size, name).peak_bytes for name in (chunked(kind), NO_STEPS))
            cells.append("-" if own is None or base is None else in_units(own - base, BYTE_UNITS))
        lines.append((chunked(kind), *cells))
    title = f"{sweep.size}: peak memory in chunks of {sweep.chunk} samples, beyond maps and landings"
    return Grid(title, ("variant", *(f"{size:,} flows" for size in columns)), tuple(lines))
