"""Part of `benchmark=step`: the tape under deterministic algorithms, and with flows that end early."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow_benchmarks.findings import Row, rows_of
from energy_flow_benchmarks.measure import Build, Effort, free, measure
from energy_flow_benchmarks.workload import Dtype, Step, Workload, step_of

RUNS = 20  # with equal bits
SHARE = 0.25  # of the steps, after which all flows have ended
DEFAULT, DETERMINISTIC = "tape", "tape, deterministic"
ALL, COMPACTED = "tape, all flows computed", "tape, ended flows left out"


def rows_of_modes(workload: Workload, title: str, batch: int, dtype: Dtype, effort: Effort) -> list[Row]:
    """Measure both comparisons; `title` names the size.

    Raises:
        RuntimeError: two runs under deterministic algorithms had different bits.
    """
    data, flows = workload.batch(batch), workload.num_flows(batch)
    tape = workload.step(batch, dtype, engine="tape")
    require_same_bits(tape())
    free(workload.device)
    deterministic: dict[str, Build] = {DEFAULT: tape, DETERMINISTIC: lambda: _deterministic_algorithms()(tape().run)}
    early: dict[str, Build] = {
        ALL: lambda: step_of(where_flows_end(workload, compaction=False), *data, dtype),
        COMPACTED: lambda: step_of(where_flows_end(workload, compaction=True), *data, dtype),
    }
    rows = []
    for case, builds in (
        (f"{title}; the same bits in {RUNS} runs (checked)", deterministic),
        (f"{title}, ending after {SHARE:.0%} of the steps", early),
    ):
        rows += rows_of("step", case, flows, measure(builds, workload.device, effort), next(iter(builds)))
    return rows


def where_flows_end(workload: Workload, **rollout: Any) -> FlowProcessor:
    """Return a processor whose flows all go straight to a plane and reach it after `SHARE` of the steps."""
    steps = max(1, round(SHARE * workload.lattice.num_steps))
    processor = workload.with_longest_move(1.001 / steps).processor(engine="tape", **rollout)
    with torch.no_grad():
        processor.carrier.displacement_head.bias[2] = 1e3  # far beyond the limit of a move
    return processor


def require_same_bits(step: Step) -> None:
    """Compare outputs and gradients of `RUNS` runs.

    Raises:
        RuntimeError: they differ in any bit.
    """
    first: list[Tensor] = []
    with _deterministic_algorithms():
        for _ in range(RUNS):
            output = step()
            found = [output, *(parameter.grad for parameter in step.parameters.values() if parameter.grad is not None)]
            if not first:
                first = [tensor.clone() for tensor in found]
            if not all(torch.equal(one, other) for one, other in zip(first, found, strict=True)):
                raise RuntimeError("two runs under deterministic algorithms had different bits")


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
