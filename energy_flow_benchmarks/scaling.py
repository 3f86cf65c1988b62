"""`benchmark=scaling`: seconds per flow and step of a training step, from few flows to very many."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from energy_flow.settings import Settings
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Row, rows_of, sizes
from energy_flow_benchmarks.turns import Build, measure_in_turns
from energy_flow_benchmarks.workload import SHORT, Count, Dtype, Seconds, SizeSettings, Workload, step_of

EAGER, TAPE, LEAN = "eager", "tape", "tape, lean"
PER_STEP = "training step"
PER_FLOW = "per flow and step"


class ScalingOnDevice(Settings):
    """What is measured on a kind of device."""

    batches: Annotated[list[Count], Field(min_length=1)]
    dtype: Dtype
    repeats: Count
    min_seconds: Seconds


class ScalingSettings(SizeSettings):
    """Config group `benchmark`, option `scaling`."""

    name: Literal["scaling"]
    dim: Count
    cpu: ScalingOnDevice
    cuda: ScalingOnDevice


def run(settings: ScalingSettings, device: torch.device, seed: int, say: Callable[[str], None]) -> Findings:
    """All batches, each by plain autograd and on the tape."""
    own = settings.cuda if device.type == "cuda" else settings.cpu
    size = SizeSettings(size=settings.size, lattice=settings.lattice, model=settings.model)
    workload = Workload.read(size, settings.dim, device, seed).where_no_flow_ends()
    rows: list[Row] = []
    for batch in sorted(set(own.batches)):
        say(f"{workload.num_flows(batch):,} flows")
        rows += _measure(workload, batch, own)
    model = workload.model
    note = (
        f"{workload.lattice.num_steps} steps, {model.num_layers} x {model.hidden_size} GRU, {SHORT[own.dtype]}; all "
        "flows are active in all steps; forward and backward, maps and landings included"
    )
    return Findings(rows, [per_flow_grid(rows)], [note])


def picture(rows: list[Row]) -> Figure:
    """Seconds per flow and step, and peak memory, against the number of flows."""
    panels = [
        Panel(PER_FLOW, "time per flow and step", SECONDS, "flows"),
        Panel(PER_STEP, "peak memory of a training step", BYTES, "flows"),
    ]
    return figure_of_panels(rows, panels, "A training step against the number of flows")


def _measure(workload: Workload, batch: int, own: ScalingOnDevice) -> list[Row]:
    data = workload.batch(batch)

    def built(**rollout: Any) -> Build:
        return lambda: step_of(workload.processor(**rollout), *data, own.dtype).run

    builds = {
        EAGER: built(engine="autograd"),
        TAPE: built(engine="tape"),
        LEAN: built(engine="tape", recompute=True),
    }
    found = measure_in_turns(builds, workload.device, repeats=own.repeats, min_seconds=own.min_seconds)
    flows = workload.num_flows(batch)
    seconds = {name: one.seconds for name, one in found.items()}
    moves = flows * workload.lattice.num_steps
    each = {name: None if taken is None else taken / moves for name, taken in seconds.items()}
    peaks = {name: one.peak_bytes for name, one in found.items()}
    return [
        *rows_of("scaling", f"{PER_FLOW}; ratio to {EAGER}", flows, each, EAGER),
        *rows_of("scaling", f"{PER_STEP}; ratio to {EAGER}", flows, seconds, EAGER, peaks),
    ]


def per_flow_grid(rows: list[Row]) -> Grid:
    """Seconds per flow and step over those at the largest size: 1 where time grows as the flows do."""
    own = [row for row in rows if row.case.startswith(PER_FLOW)]
    columns = sizes(own, PER_FLOW)
    lines = []
    for variant in dict.fromkeys(row.variant for row in own):
        taken = {row.size: row.seconds for row in own if row.variant == variant}
        last = taken[columns[-1]]
        cells = (taken[size] for size in columns)
        lines.append((variant, *("-" if not one or not last else f"{one / last:.3g}" for one in cells)))
    title = f"Time per flow and step, relative to {columns[-1]:,} flows"
    return Grid(title, ("variant", *(f"{size:,} flows" for size in columns)), tuple(lines))
