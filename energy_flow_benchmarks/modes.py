"""Part of `benchmark=step`: the tape under deterministic algorithms, and where flows end early."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow_benchmarks.findings import Row
from energy_flow_benchmarks.turns import Build, measure_in_turns
from energy_flow_benchmarks.workload import Dtype, Step, Workload, free, step_of

RUNS = 20  # whose bits are compared
SHARE = 0.25  # of the steps after which all flows have ended
AS_IT_IS, DETERMINISTIC = "tape", "tape, deterministic"
ALL, LEFT_OUT = "tape, all flows computed", "tape, flows that have ended left out"


def allow_deterministic_products() -> None:
    """To be called before the first product on a GPU: cuBLAS then keeps to workspaces of a fixed size (on Hopper those
    that it has anyway)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def rows_of_modes(
    workload: Workload, title: str, batch: int, dtype: Dtype, *, repeats: int, min_seconds: float
) -> list[Row]:
    """Rows of both comparisons; `title` names the size.

    Raises:
        RuntimeError: two runs under deterministic algorithms had other bits.
    """
    data, flows = workload.batch(batch), workload.num_flows(batch)

    def step(processor: FlowProcessor) -> Step:
        return step_of(processor, *data, dtype)

    require_same_bits(step(workload.processor(engine="tape")))
    free(workload.device)
    deterministic: dict[str, Build] = {
        AS_IT_IS: lambda: step(workload.processor(engine="tape")).run,
        DETERMINISTIC: lambda: _deterministic(step(workload.processor(engine="tape")).run),
    }
    early: dict[str, Build] = {
        ALL: lambda: step(where_flows_end(workload, compaction=False)).run,
        LEFT_OUT: lambda: step(where_flows_end(workload, compaction=True)).run,
    }
    rows = []
    for case, builds in (
        (f"{title}; the same bits in {RUNS} runs (checked); ratio to {AS_IT_IS}", deterministic),
        (f"{title}, ending after {SHARE:.0%} of the steps; ratio to {ALL}", early),
    ):
        found = measure_in_turns(builds, workload.device, repeats=repeats, min_seconds=min_seconds)
        base = found[next(iter(builds))].seconds
        for name, one in found.items():
            ratio = base / one.seconds if base and one.seconds else None
            rows.append(Row("step", case, flows, name, one.seconds, one.peak_bytes, ratio))
    return rows


def where_flows_end(workload: Workload, **rollout: Any) -> FlowProcessor:
    """A processor whose flows all go straight to a plane, and are there after `SHARE` of the steps."""
    steps = max(1, round(SHARE * workload.lattice.num_steps))
    movement = workload.lattice.movement.model_copy(update={"max_displacement": 1.001 / steps})
    lattice = workload.lattice.model_copy(update={"movement": movement})
    ending = Workload(lattice, workload.model, workload.dim, workload.device, workload.seed)
    processor = ending.processor(engine="tape", **rollout)
    with torch.no_grad():
        processor.carrier.displacement_head.bias[2] = 1e3  # far beyond the limit
    return processor


def require_same_bits(step: Step) -> None:
    """Raises RuntimeError if outputs or gradients of `RUNS` runs differ in any bit."""
    first: list[Tensor] = []
    with _deterministic_algorithms():
        for _ in range(RUNS):
            output = step.run()
            found = [output, *(parameter.grad for parameter in step.parameters.values() if parameter.grad is not None)]
            if not first:
                first = [tensor.clone() for tensor in found]
            if not all(torch.equal(one, other) for one, other in zip(first, found, strict=True)):
                raise RuntimeError("two runs under deterministic algorithms had other bits")


def _deterministic(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def deterministic() -> Tensor:
        with _deterministic_algorithms():
            return run()

    return deterministic


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
