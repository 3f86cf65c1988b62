"""`benchmark=scaling`: time per flow and step of a training step, from few flows to very many."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Measured, Row, find, grid_by_size, rows_of, sizes_of
from energy_flow_benchmarks.measure import Count, Effort, measure
from energy_flow_benchmarks.workload import SHORT, Dtype, SizeSettings, Workload

EAGER, TAPE, LEAN = "eager", "tape", "tape, lean"
PER_STEP = "training step"
PER_FLOW = "per flow and step"


class ScalingOnDevice(Effort):
    """The measurements on one kind of device."""

    batches: Annotated[list[Count], Field(min_length=1)]
    dtype: Dtype


class ScalingSettings(SizeSettings):
    """Config group `benchmark`, option `scaling`."""

    name: Literal["scaling"]
    dim: Count
    cpu: ScalingOnDevice
    cuda: ScalingOnDevice


def run(settings: ScalingSettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Measure all batches, each with plain autograd and with the tape."""
    own: ScalingOnDevice = getattr(settings, device.type)
    workload = Workload.read(settings, settings.dim, device, seed).where_no_flow_ends()
    rows: list[Row] = []
    for batch in sorted(set(own.batches)):
        progress(f"{workload.num_flows(batch):,} flows")
        rows += _measure(workload, batch, own)
    model = workload.model
    note = (
        f"{workload.lattice.num_steps} steps, {model.num_layers} x {model.hidden_size} GRU, {SHORT[own.dtype]}; all "
        "flows are active in all steps; forward and backward, maps and landings included"
    )
    return Findings(rows, [per_flow_grid(rows)], [note])


def picture(rows: list[Row]) -> Figure:
    """Draw time per flow and step, and peak memory, against the number of flows."""
    panels = [
        Panel(PER_FLOW, "time per flow and step", SECONDS, "flows"),
        Panel(PER_STEP, "peak memory of a training step", BYTES, "flows"),
    ]
    return figure_of_panels(rows, panels, "A training step against the number of flows")


def _measure(workload: Workload, batch: int, own: ScalingOnDevice) -> list[Row]:
    builds = {
        EAGER: workload.step(batch, own.dtype, engine="autograd", chunk=None, compile=False),
        TAPE: workload.step(batch, own.dtype, engine="tape"),
        LEAN: workload.step(batch, own.dtype, engine="tape", recompute=True),
    }
    found = measure(builds, workload.device, own)
    flows = workload.num_flows(batch)
    moves = flows * workload.lattice.num_steps
    each = {name: Measured(None if one.seconds is None else one.seconds / moves) for name, one in found.items()}
    return rows_of("scaling", PER_FLOW, flows, each, EAGER) + rows_of("scaling", PER_STEP, flows, found, EAGER)


def per_flow_grid(rows: list[Row]) -> Grid:
    """Show the time per flow and step, relative to the largest size: 1 where time is proportional to the flows."""
    sizes = sizes_of(rows, PER_FLOW)
    lines = {}
    for variant in (EAGER, TAPE, LEAN):
        *_, last = seconds = [find(rows, PER_FLOW, size, variant).seconds for size in sizes]
        lines[variant] = ["-" if not one or not last else f"{one / last:.3g}" for one in seconds]
    return grid_by_size(f"Time per flow and step, relative to {sizes[-1]:,} flows", "variant", sizes, "flows", lines)
