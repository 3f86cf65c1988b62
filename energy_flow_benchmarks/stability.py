"""`benchmark=stability`: a long training with changing populations; do memory or time grow?"""

import statistics
from collections.abc import Callable
from typing import Annotated, Literal, Self

import psutil
import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.core.timing import PhaseTimer
from energy_flow.settings import Settings
from energy_flow.viz.style import BLUE, GREEN, ORANGE, VERMILION, new_figure
from energy_flow_benchmarks.figures import plain_axes
from energy_flow_benchmarks.findings import Findings, Grid, Row
from energy_flow_benchmarks.measure import Count, free
from energy_flow_benchmarks.output import in_bytes, in_seconds
from energy_flow_benchmarks.workload import SHORT, Dtype, SizeSettings, Workload, autocast

STEP, RESIDENT = "training step", "resident memory"
IN_USE, RESERVED = "device memory in use", "device memory reserved"
STATS = {IN_USE: "allocated_bytes.all.current", RESERVED: "reserved_bytes.all.current"}
COUNTS = {
    "allocation retries": "num_alloc_retries",
    "segments": "segment.all.current",
    "segments ever allocated": "segment.all.allocated",
}
COLOURS = {STEP: BLUE, RESERVED: VERMILION, IN_USE: ORANGE, RESIDENT: GREEN}
EARLY = 10  # ratios refer to this step
SETTLED, END = "after warm-up", "at the end"
LEARNING_RATE = 1e-4
NUM_REPORTS = 10  # of time and memory, evenly over the run


class StabilityOnDevice(SizeSettings):
    """The training on one kind of device."""

    dtype: Dtype
    batches: Annotated[list[Count], Field(min_length=1)]


class StabilitySettings(Settings):
    """Config group `benchmark`, option `stability`."""

    name: Literal["stability"]
    dim: Count
    steps: Count
    warmup_steps: Count
    window: Count
    validate_every: Count
    cleanup_every: Count
    cpu: StabilityOnDevice
    cuda: StabilityOnDevice

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.steps <= self.warmup_steps or self.steps < self.window:
            raise ValueError(
                f"benchmark.steps = {self.steps}: must be more than benchmark.warmup_steps = {self.warmup_steps} and "
                f"at least benchmark.window = {self.window}"
            )
        return self


class Training:
    """A training whose flows spawn, are removed and explore. Every batch is new; batch sizes alternate."""

    def __init__(self, workload: Workload, batches: list[int], dtype: Dtype) -> None:
        self.processor: FlowProcessor = workload.processor()
        self._workload, self._batches, self._dtype = workload, batches, dtype
        self._generator = torch.Generator(workload.device).manual_seed(workload.seed)
        self._optimizer = torch.optim.AdamW(self.processor.parameters(), lr=LEARNING_RATE)
        self._num_steps = 0
        self.created: list[Tensor] = []  # per step: flows per sample, mean over the batch
        self.removed: list[Tensor] = []

    def step(self) -> None:
        """Run forward, backward and the optimiser."""
        source, target, rows = self._draw(self._batches[self._num_steps % len(self._batches)])
        self._optimizer.zero_grad()
        with autocast(self._dtype, source.device):
            output: FlowOutput = self.processor(source, rows)
            loss = functional.mse_loss(output.embedding.float(), target)
        loss.backward()
        self._optimizer.step()
        self.processor.optimizer_step.add_(1)
        self.created.append(output.statistics["created"])
        self.removed.append(output.statistics["removed"])
        self._num_steps += 1

    @torch.no_grad()
    def validate(self) -> None:
        """Run a batch of the largest size, without noise and without a graph."""
        self.processor.eval()
        with autocast(self._dtype, self._workload.device):
            self.processor(self._draw(max(self._batches))[0])
        self.processor.train()

    def _draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return source and target [B, D] and data rows [B]."""
        shape, device = (batch, self._workload.dim), self._workload.device
        source, target = (torch.randn(shape, generator=self._generator, device=device) for _ in range(2))
        rows = torch.arange(batch, device=device) + self._num_steps * max(self._batches)
        return functional.normalize(source, dim=-1), functional.normalize(target, dim=-1), rows


def run(settings: StabilitySettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Train; read the memory at some steps, and all times at the end.

    Raises:
        RuntimeError: parameters are no longer finite, or the population never changed.
    """
    own: StabilityOnDevice = getattr(settings, device.type)
    free(device)
    workload = Workload.read(own, settings.dim, device, seed)
    training, timer = Training(workload, own.batches, own.dtype), PhaseTimer(device)
    reported = reported_steps(settings)
    rows: list[Row] = []
    for step in range(1, settings.steps + 1):
        with timer.phase(str(step)):
            training.step()
        if step % settings.validate_every == 0:
            training.validate()
        if step % settings.cleanup_every == 0:
            training.processor.cleanup_memory_safe()
        if step in reported:
            progress(f"step {step:,} of {settings.steps:,}")
            rows += _memory_rows(settings, step, device)
    seconds = timer.seconds(wait=True) or {}  # read at the end, so that steps on a GPU don't wait for each other
    rows = _time_rows(settings, reported, list(seconds.values())) + rows
    created, removed = (torch.stack(counts).cpu() for counts in (training.created, training.removed))
    _require_changes(training.processor, created, removed)
    notes = [
        f"{settings.steps:,} steps with AdamW, {SHORT[own.dtype]}, alternating batches of "
        f"{', '.join(map(str, own.batches))} samples, {workload.lattice.num_cells} cells, {workload.lattice.num_steps} "
        f"steps; a batch without gradients every {settings.validate_every}, cleanup_memory_safe() every "
        f"{settings.cleanup_every}",
        f"flows created per sample {created.min():.5g} to {created.max():.5g}, removed {removed.min():.5g} to "
        f"{removed.max():.5g}",
        f"time at a step: the median of the {settings.window} steps around it; ratio: to step {EARLY}",
    ]
    return Findings(rows, [growth_grid(rows, settings)], notes)


def picture(rows: list[Row]) -> Figure:
    """Draw time and memory over the steps, both from zero, so that growth shows."""
    figure = new_figure(10, 3.6)
    time_axes, memory_axes = figure.subplots(1, 2)
    time_axes.set_title("time of a training step (median of the steps around it)", fontsize=10)
    time_axes.set_ylabel("milliseconds", fontsize=9)
    memory_axes.set_title("memory", fontsize=10)
    memory_axes.set_ylabel("MiB", fontsize=9)
    for case, colour in COLOURS.items():
        own = [row for row in rows if row.case.startswith(case)]
        axes = time_axes if case == STEP else memory_axes
        values = [(row.seconds or 0) * 1e3 if case == STEP else (row.peak_bytes or 0) / 2**20 for row in own]
        if own:
            axes.plot([row.size for row in own], values, color=colour, marker="o", markersize=4, label=case)
    for axes in figure.axes:
        axes.set_ylim(0, 1.25 * axes.dataLim.ymax)
        axes.set_xlim(left=0)
        axes.set_xlabel("step", fontsize=9)
        plain_axes(axes)
    memory_axes.legend(fontsize=9, frameon=False, loc="lower right")
    figure.suptitle("Time and memory over a training with changing populations", fontsize=12)
    return figure


def reported_steps(settings: StabilitySettings) -> list[int]:
    """Return the steps whose time and memory are reported: an early one, the end of the warm-up, then evenly."""
    evenly = {max(1, settings.steps * part // NUM_REPORTS) for part in range(1, NUM_REPORTS + 1)}
    return sorted({min(EARLY, settings.steps), settings.warmup_steps, *evenly})


def steps_around(seconds: list[float], step: int, window: int) -> list[float]:
    """Return the seconds of the `window` steps around a step (counted from 1), moved inside near an end."""
    first = min(max(step - 1 - window // 2, 0), max(len(seconds) - window, 0))
    return seconds[first : first + window]


def _time_rows(settings: StabilitySettings, reported: list[int], seconds: list[float]) -> list[Row]:
    taken = {step: statistics.median(steps_around(seconds, step, settings.window)) for step in reported}
    early = min(EARLY, settings.steps)
    case = f"{STEP}; ratio to step {early}"
    return [Row("stability", case, step, "step", one, ratio=taken[early] / one) for step, one in taken.items()]


def _memory_rows(settings: StabilitySettings, step: int, device: torch.device) -> list[Row]:
    rows = [Row("stability", RESIDENT, step, "process", None, psutil.Process().memory_info().rss)]
    if device.type == "cuda":
        found = torch.cuda.memory_stats(device)
        rows += [Row("stability", case, step, "allocator", None, found[key]) for case, key in STATS.items()]
        if step in (settings.warmup_steps, settings.steps):
            when = SETTLED if step == settings.warmup_steps else END
            rows += [Row("stability", case, step, when, None, count=found[key]) for case, key in COUNTS.items()]
    return rows


def _require_changes(processor: FlowProcessor, created: Tensor, removed: Tensor) -> None:
    if not all(bool(parameter.isfinite().all()) for parameter in processor.parameters()):
        raise RuntimeError("parameters are no longer finite")
    if created.max() <= processor.settings.num_cells or removed.max() == 0:
        raise RuntimeError(
            "the population never changed: no step created a child, or no step removed a flow. In benchmark.cpu.lattice"
            " (on a GPU benchmark.cuda.lattice) lower spawn.threshold or raise filter.min_displacement"
        )


def growth_grid(rows: list[Row], settings: StabilitySettings) -> Grid:
    """Compare time and memory after the warm-up and at the end."""
    steps = (settings.warmup_steps, settings.steps)
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        at = {row.size: row for row in rows if row.case == case}
        lines.append((case, *(_value(at[step]) for step in steps)))
    columns = ("measured", *(f"after {step:,} steps" for step in steps))
    return Grid("Growth of memory and time over a long training", columns, tuple(lines))


def _value(row: Row) -> str:
    if row.count is not None:
        return f"{row.count:,}"
    return in_bytes(row.peak_bytes) if row.seconds is None else in_seconds(row.seconds)
