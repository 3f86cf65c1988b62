"""`benchmark=report`: the end of a batch by the earlier method and by the present one, side by side.

`docs/performance-report.md` names the case that measures each item of the owner's performance analysis.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, Self

import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow_benchmarks import before
from energy_flow_benchmarks.end_of_batch import BEFORE, MEMORY, NOW, TIME_CASES, TOLERANCE, EndOfBatch
from energy_flow_benchmarks.figures import BYTES, SECONDS, Panel, figure_of_panels
from energy_flow_benchmarks.findings import Findings, Grid, Measured, Row, find, rows_of, sizes_of
from energy_flow_benchmarks.flows import EMBEDDING_DIM, plane_of, report_lattice
from energy_flow_benchmarks.measure import Count, Effort, measure, require_within
from energy_flow_benchmarks.workload import settings_of

CURVE_LIMIT = 1e-8  # float64 rounding, amplified by the optimiser steps
BATCH = 2  # samples of a training step
LEARNING_RATE = 1e-3
STEP, CURVE = "training step", "loss curve"
CASES = (*TIME_CASES, MEMORY, STEP, CURVE)
TITLES = {
    "collection": "completed flows, cells",
    "aggregation": "softmax per cell",
    "cleanup": "freeing flows",
    "data processing": "active flows",
    "end of batch": "all of it",
}

# The analysis expects these savings; the case measures them.
EXPECTED = (
    ("Solution 1: collection time", "50-70% less", "collection"),
    ("Solution 2: memory usage", "30-50% less", MEMORY),
    ("Solution 3: aggregation time", "60-80% less", "aggregation"),
    ("Solution 4: cleanup time", "40-60% less", "cleanup"),
    ("Solution 5: data processing overhead", "50-70% less", "data processing"),
    ("Criterion: end-of-batch processing time", "50%+ less", "end of batch"),
    ("Criterion: peak memory usage", "30%+ less", MEMORY),
)


class ReportSettings(Effort):
    """Config group `benchmark`, option `report`."""

    name: Literal["report"]
    flows: Annotated[list[Count], Field(min_length=1)]
    samples: Count
    energy_dim: Count
    hidden_size: Count
    training_flows: Annotated[list[Count], Field(min_length=1)]
    curve_steps: Count

    @model_validator(mode="after")
    def _whole_samples(self) -> Self:
        for key, values, samples in (
            ("flows", self.flows, self.samples),
            ("training_flows", self.training_flows, BATCH),
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


def run(settings: ReportSettings, device: torch.device, seed: int, progress: Callable[[str], None]) -> Findings:
    """Measure both sides at every size, on the same flows.

    Raises:
        RuntimeError: the two sides gave different results.
    """
    rows: list[Row] = []
    sizes = (settings.samples, settings.energy_dim, settings.hidden_size)
    for num_flows in settings.flows:
        progress(f"{num_flows:,} flows")
        rows += EndOfBatch(num_flows, *sizes, device, seed).rows(settings)
    for num_flows in settings.training_flows:
        progress(f"training steps of {num_flows:,} flows")
        rows += _training_rows(settings, num_flows, device, seed)
    progress(f"{settings.curve_steps} training steps of both sides")
    curve_rows, difference = _curve_rows(settings, device, seed)
    memory = "the allocator's bytes" if device.type == "cuda" else "growth of the process's resident memory"
    return Findings(
        rows=rows + curve_rows,
        grids=[impact_grid(rows, difference)],
        notes=[
            f"flows: {settings.samples} samples per batch, energy dimension {settings.energy_dim}, hidden size "
            f"{settings.hidden_size}, float32; every case has the same flows on both sides, and their results are "
            "equal (checked)",
            "before: one Python object per flow, loops, dictionaries, .item(), one stack per group; now: tensors",
            f"peak memory: of holding the flows and ending the batch, graph included; {memory}",
            f"loss curves of {settings.curve_steps} training steps (float64, 32 flows) differ by at most "
            f"{difference:.1e}",
            "docs/performance-report.md answers the performance analysis item by item, with the code, the tests and "
            "the case of each",
        ],
    )


def picture(rows: list[Row]) -> Figure:
    """Draw both sides of every case against the number of flows."""
    panels = [Panel(case, f"{case}: {title}", SECONDS, "flows in the batch") for case, title in TITLES.items()]
    panels.append(Panel(MEMORY, "peak memory: flows and end of batch", BYTES, "flows in the batch"))
    return figure_of_panels(rows, panels, "The end of a batch: flows as Python objects (before), as tensors (now)")


def impact_grid(rows: Sequence[Row], curve_difference: float) -> Grid:
    """Compare the expected savings of the analysis with the measured ones, at every size."""
    sizes = sizes_of(rows, TIME_CASES[0])
    columns = ("line of the analysis", "expected", *(f"{size:,} flows" for size in sizes))
    lines = [
        (line, expected, *(_percent(share_saved(rows, case, size)) for size in sizes))
        for line, expected, case in EXPECTED
    ]
    same = (f"losses differ by {curve_difference:.0e}", *[""] * (len(sizes) - 1))
    lines.append(("Criterion: training accuracy and convergence", "maintained", *same))
    return Grid("Expected and measured savings of the performance analysis", columns, tuple(lines))


def share_saved(rows: Sequence[Row], case: str, size: int) -> float | None:
    """Return 1 - now / before: of bytes for the peak memory, of seconds for other cases; None where not measured."""
    sides = [find(rows, case, size, side) for side in (BEFORE, NOW)]
    old, new = [side.peak_bytes if case == MEMORY else side.seconds for side in sides]
    return None if not old or new is None else 1 - new / old


def _percent(share: float | None) -> str:
    """Write a saving; decimals are rounded down, and 99.96 has two of them, so that it does not read as 100.0."""
    if share is None:
        return "not measured"
    percent = 100 * abs(share)
    decimals = 1 if percent < 99.9 or percent >= 100 else 2 if percent < 99.99 else 3
    rounded = int(percent * 10**decimals) / 10**decimals
    return f"{rounded:.{decimals}f}% {'less' if share >= 0 else 'more'}"


def training_step(
    side: str,
    lattice: LatticeSettings,
    energy_dim: int,
    hidden_size: int,
    device: torch.device,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], Tensor]:
    """Return a function that runs one training step (forward, backward, AdamW) by one side and returns the loss.

    The batch has two samples. It and the first parameters depend on `seed` alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = settings_of(ModelSettings, "model", {"energy_dim": energy_dim, "hidden_size": hidden_size})
        processor = FlowProcessor(EMBEDDING_DIM, lattice, model, seed=seed)
        source, target = (functional.normalize(torch.randn(BATCH, EMBEDDING_DIM), dim=-1) for _ in range(2))
    processor = processor.to(device=device, dtype=dtype)
    source, target = source.to(device, dtype), target.to(device, dtype)
    optimizer = torch.optim.AdamW(processor.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad()
        output = before.forward(processor, source) if side == "before" else processor(source).embedding
        loss = functional.mse_loss(output, target) + (1 - functional.cosine_similarity(output, target)).mean()
        loss.backward()
        optimizer.step()
        processor.optimizer_step.add_(1)
        return loss.detach()

    return step


def loss_curves(
    sides: Iterable[str], num_steps: int, device: torch.device, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return losses [num_steps] and seconds of a tiny training, per side: 2 samples, 4 x 4 cells, 3 steps, float64."""
    lattice = report_lattice(4, 4, depth=6, movement={"warmup_steps": 0})
    curves: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for side in sides:
        step = training_step(side, lattice, 1, 8, device, seed, torch.float64)
        begin = time.perf_counter()
        curves[side] = torch.stack([step() for _ in range(num_steps)]).cpu()
        seconds[side] = time.perf_counter() - begin
    return curves, seconds


def _training_rows(settings: ReportSettings, num_flows: int, device: torch.device, seed: int) -> list[Row]:
    """Measure whole training steps: forward, backward, optimiser."""
    width, height = plane_of(num_flows // BATCH)
    lattice = report_lattice(width, height, depth=6)
    sizes = (settings.energy_dim, settings.hidden_size)
    sides = {side: training_step(side, lattice, *sizes, device, seed) for side in (BEFORE, NOW)}
    require_within(f"{STEP}: loss", sides[BEFORE](), sides[NOW](), TOLERANCE)
    builds = {side: lambda step=step: step for side, step in sides.items()}
    return rows_of("report", STEP, num_flows, measure(builds, device, settings), BEFORE)


def _curve_rows(settings: ReportSettings, device: torch.device, seed: int) -> tuple[list[Row], float]:
    """Return the rows of the two loss curves, and the largest difference between them."""
    curves, seconds = loss_curves((BEFORE, NOW), settings.curve_steps, device, seed)
    difference = float((curves[BEFORE] - curves[NOW]).abs().max())
    if not difference <= CURVE_LIMIT:
        raise RuntimeError(
            f"loss curves of {settings.curve_steps} training steps differ by {difference:.3g}, allowed {CURVE_LIMIT:g}"
        )
    found = {side: Measured(taken) for side, taken in seconds.items()}
    return rows_of("report", f"{CURVE} of {settings.curve_steps} steps", 32, found, BEFORE), difference
