"""The report, item by item: where its answer lives, the tests that hold it, the figure that this run measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from energy_flow_benchmarks.findings import Grid, Row, find, sizes

HEADLINE_FLOWS = 20_000  # figures are given at the measured size next to this one

LATTICE = "energy_flow/core/energy_lattice.py"
PROCESSOR = "energy_flow/core/flow_processor.py"
STORAGE = "energy_flow/core/tensorized_flow_storage.py"
SOFTMAX = "energy_flow/ops/group_softmax.py"
CLEANUP = "energy_flow/training/callbacks/memory_cleanup.py"
COLLECT = f"{LATTICE}::EnergyLattice.collect"
AGGREGATE = f"{LATTICE}::EnergyLattice.aggregate"
SURFACE = f"{LATTICE}::EnergyLattice.collect_completed_flows_surface_direct"
EMBEDDING = f"{LATTICE}::EnergyLattice.collect_completed_flows_direct"
GROUP_SOFTMAX = f"{SOFTMAX}::group_softmax_deposit"
REMOVE = f"{PROCESSOR}::FlowProcessor.cleanup_memory_safe"
CALLBACK = f"{CLEANUP}::MemoryCleanup"
POOL = "energy_flow/core/tensor_pool.py::TensorPool"
FLOWS = f"{STORAGE}::TensorizedFlowStorage"

NO_LOOP = "tests/core/test_vectorised.py::test_no_loop_over_flows_cells_or_samples"
NO_WAIT = "tests/core/test_vectorised.py::test_no_wait_inside_a_rollout"
NO_WAIT_IN_CODE = "tests/test_imports.py::test_core_and_ops_do_not_wait_for_the_device"
REFERENCE = "tests/core/test_against_reference.py::test_equals_the_reference"
FORMULA = "tests/ops/test_group_softmax.py::test_equals_the_formula"
COLLECTION = "tests/core/test_faults.py::test_collection_equals_forward"
REUSE = "tests/core/test_memory.py::TestTensorPool::test_memory_is_reused"
GROWTH = "tests/core/test_memory.py::test_nothing_grows"
RARELY = "tests/training/test_memory_cleanup.py::test_acts_at_exactly_these_batches"
THRESHOLD = "tests/training/test_memory_cleanup.py::TestCache::test_emptied_above_the_raised_threshold"
ASYNCHRONOUS = "tests/training/test_memory_cleanup.py::TestHost::test_training_does_not_wait_for_it"
GIVES_BACK = "tests/core/test_memory.py::test_clean_up_gives_back_what_the_last_batch_left"
STORED_ONCE = "tests/core/test_storage.py::test_children_take_slots_in_the_order_of_their_parents"
SLOTS = "tests/core/test_slots.py::test_flows_start_at_their_cells"
NO_STORAGE = "tests/core/test_faults.py::test_collection_without_tensorised_storage"
NO_SCATTER = "tests/core/test_faults.py::test_a_torch_without_scatter_reduce"
NO_LANDING = "tests/core/test_faults.py::test_samples_without_a_landing_raise_when_collected"
ENDS_TRAINING = "tests/training/test_module.py::test_a_sample_without_landing_ends_training_before_the_optimiser_steps"
PHASES = "tests/training/test_phase_times.py::test_times_one_batch_of_every_n"
MONITOR = "tests/training/test_memory_monitor.py::test_logs_at_every_nth_batch_and_reads_at_no_other"
GOLDEN = "tests/training/test_module.py::test_the_loss_curve_is_the_golden_one"
BOTH_SIDES = "tests/benchmarks/test_report.py::test_both_sides_give_the_same"
SAME_CURVES = "tests/benchmarks/test_report.py::test_the_loss_curves_are_equal_and_fall"


@dataclass(frozen=True)
class Answer:
    """One item of the report."""

    item: str
    what: str  # how it is answered
    where: tuple[str, ...]  # path, or path::name
    tests: tuple[str, ...]  # path::name
    cases: tuple[str, ...] = ()  # whose figure belongs to it


END, CURVES = "end of batch", "loss curves"  # the second has no rows of its own: its figure is the difference
TIME_CASES = ("collection", "aggregation", "cleanup", "data processing", END)
MEMORY = "peak memory"

ISSUES = (
    Answer(
        "Finding 1: flow collection at batch end",
        "all landings and their cells in one pass over tensors",
        (SURFACE, EMBEDDING, COLLECT),
        (COLLECTION, NO_LOOP),
        ("collection",),
    ),
    Answer(
        "Finding 2: memory-intensive tensor operations",
        "a pool of buffers, allocated once; no stack or concatenation per group",
        (POOL, AGGREGATE),
        (REUSE, GROWTH),
        (MEMORY,),
    ),
    Answer(
        "Finding 3: CPU-bound aggregation",
        "one softmax over all groups of all samples",
        (GROUP_SOFTMAX, AGGREGATE),
        (FORMULA, NO_LOOP),
        ("aggregation",),
    ),
    Answer(
        "Finding 4: cleanup operations",
        "everything in one go, rarely: every interval x 2 batches, device memory every interval x 4",
        (REMOVE, CALLBACK),
        (RARELY, THRESHOLD),
        ("cleanup",),
    ),
    Answer(
        "Finding 5: redundant data processing",
        "active flows are a mask; positions are normalised once, when they are made",
        (FLOWS, "energy_flow/core/geometry.py::cell_centres"),
        (STORED_ONCE, REFERENCE),
        ("data processing",),
    ),
)
ROOT_CAUSES = (
    Answer(
        "Root cause 1: Python loop overhead",
        "no loop over flows, groups or cells; the number of operations doesn't depend on their number",
        (COLLECT, GROUP_SOFTMAX),
        (NO_LOOP,),
        (END,),
    ),
    Answer(
        "Root cause 2: memory management",
        "pooled buffers, written in place where autograd doesn't watch",
        (POOL, FLOWS),
        (REUSE, GROWTH),
        (MEMORY,),
    ),
    Answer(
        "Root cause 3: CPU-GPU synchronisation",
        "the rollout never waits; findings leave the device by copies that don't block",
        (PROCESSOR, "energy_flow/core/host_copy.py"),
        (NO_WAIT, NO_WAIT_IN_CODE),
    ),
    Answer(
        "Root cause 4: data structures",
        "a grid of slots [B, M]; a group's key is sample * S + cell, without any dictionary",
        (FLOWS, COLLECT),
        (SLOTS,),
        ("data processing",),
    ),
    Answer(
        "Root cause 5: no batch processing",
        "all flows of all samples step, land and end together",
        (PROCESSOR, FLOWS),
        (NO_LOOP, REFERENCE),
        ("training step",),
    ),
)
SOLUTIONS = (
    Answer(
        "Solution 1: vectorised collection",
        "cells by arithmetic on coordinates; keys are known, so nothing is sorted and torch.unique isn't needed",
        (COLLECT, SURFACE),
        (COLLECTION, BOTH_SIDES),
        ("collection",),
    ),
    Answer(
        "Solution 2: memory management",
        "pooling, in-place writes, no synchronisation in the rollout",
        (POOL, REMOVE),
        (REUSE, GIVES_BACK),
        (MEMORY,),
    ),
    Answer(
        "Solution 3: aggregation logic",
        "scores are computed once per landing, the sums are scattered",
        (GROUP_SOFTMAX, f"{LATTICE}::Landings.score"),
        (FORMULA, BOTH_SIDES),
        ("aggregation",),
    ),
    Answer(
        "Solution 4: cleanup operations",
        "batched, conditional, the heap trimmed in the background",
        (REMOVE, CALLBACK),
        (RARELY, ASYNCHRONOUS),
        ("cleanup",),
    ),
    Answer(
        "Solution 5: data structures",
        "flows as tensors; grouping by a spatial key that needs no hash table",
        (FLOWS, COLLECT),
        (STORED_ONCE, SLOTS),
        ("data processing",),
    ),
)
DECISIONS = (
    Answer(
        "Decision 2025-08-12: tensorised storage only",
        "tensorized_storage_enabled=false is refused, by the config and by the collection",
        (f"{LATTICE}::LatticeSettings", COLLECT),
        (NO_STORAGE,),
    ),
    Answer(
        "Decision 2025-08-12: stable softmax per group",
        "scatter_reduce takes the maximum of a group; a torch without it is refused",
        (GROUP_SOFTMAX,),
        ("tests/ops/test_group_softmax.py::test_extreme_scores", NO_SCATTER),
        ("aggregation",),
    ),
    Answer(
        "Decision 2025-08-12: errors, no silent zeros",
        "samples without a landing raise and are named; in training before the optimiser steps",
        (EMBEDDING, "energy_flow/core/faults.py"),
        (NO_LANDING, ENDS_TRAINING),
    ),
)
METRICS = (
    Answer(
        "Metric: batch time before and after",
        "this benchmark",
        ("energy_flow_benchmarks/report.py", "energy_flow_benchmarks/before.py"),
        (BOTH_SIDES,),
        (END,),
    ),
    Answer(
        "Metric: CPU and GPU memory",
        "host RSS; device allocated, reserved, peak, inactive",
        ("energy_flow/training/callbacks/memory_monitor.py::MemoryMonitor",),
        (MONITOR,),
    ),
    Answer(
        "Metric: collection and aggregation times",
        "seconds of every part of a step, as time/* in TensorBoard",
        ("energy_flow/training/callbacks/phase_times.py::PhaseTimes",),
        (PHASES,),
    ),
)
CRITERIA = (
    Answer("Criterion: 50% less end-of-batch time", "measured by this run", (SURFACE, REMOVE), (BOTH_SIDES,), (END,)),
    Answer("Criterion: 30% less peak memory", "measured by this run", (POOL, AGGREGATE), (GROWTH,), (MEMORY,)),
    Answer(
        "Criterion: accuracy and convergence kept",
        "equal loss curves of both sides, a slow reference, a golden curve",
        ("tests/reference.py::Reference", PROCESSOR),
        (SAME_CURVES, REFERENCE, GOLDEN),
        (CURVES,),
    ),
)
ANSWERS = (*ISSUES, *ROOT_CAUSES, *SOLUTIONS, *DECISIONS, *METRICS, *CRITERIA)

# What the report expects of its proposals, and the case that measures it.
EXPECTED_IMPACT = (
    ("Solution 1: collection time", "50-70% less", "collection"),
    ("Solution 2: memory usage", "30-50% less", MEMORY),
    ("Solution 3: aggregation time", "60-80% less", "aggregation"),
    ("Solution 4: cleanup time", "40-60% less", "cleanup"),
    ("Solution 5: data processing overhead", "50-70% less", "data processing"),
    ("Criterion: end-of-batch processing time", "50%+ less", END),
    ("Criterion: peak memory usage", "30%+ less", MEMORY),
)


def share_saved(rows: Sequence[Row], case: str, size: int) -> float | None:
    """1 - now / before, of bytes for the peak memory and of seconds for all else; None where one wasn't measured."""
    sides = [find(rows, case, size, side) for side in ("before", "now")]
    old, new = [side.peak_bytes if case == MEMORY else side.seconds for side in sides]
    return None if not old or new is None else 1 - new / old


def impact_grid(rows: Sequence[Row], curve_difference: float) -> Grid:
    """The report's expected impact and validation criteria, each beside what was measured at every size."""
    columns = sizes(rows, END)
    lines = [
        (line, expected, *(_percent(share_saved(rows, case, size)) for size in columns))
        for line, expected, case in EXPECTED_IMPACT
    ]
    same = f"losses equal to {curve_difference:.0e}"
    lines.append(("Criterion: training accuracy and convergence", "maintained", same, *("",) * (len(columns) - 1)))
    return Grid(
        "Expected impact and validation criteria: what the report expects, what was measured",
        ("line of the report", "expected", *(f"{size:,} flows" for size in columns)),
        tuple(lines),
    )


def answers_grid(rows: Sequence[Row], curve_difference: float) -> Grid:
    """Every item of the report with its place, its tests and its figure."""
    return Grid(
        "The report, item by item",
        ("item", "answer", "where", "tests", "figure"),
        tuple(
            (
                answer.item,
                answer.what,
                ", ".join(answer.where),
                ", ".join(answer.tests),
                "; ".join(_figure(rows, case, curve_difference) for case in answer.cases) or "held by the tests",
            )
            for answer in ANSWERS
        ),
    )


def _figure(rows: Sequence[Row], case: str, curve_difference: float) -> str:
    if case == CURVES:
        return f"loss curves differ by at most {curve_difference:.0e}"
    size = min(sizes(rows, case), key=lambda measured: abs(measured - HEADLINE_FLOWS))
    what = "memory" if case == MEMORY else "time"
    return f"{case}: {_percent(share_saved(rows, case, size))} {what} at {size:,} flows"


def _percent(share: float | None) -> str:
    if share is None:
        return "not measured"
    percent = 100 * abs(share)
    return f"{_rounded_down(percent)}% {'less' if share >= 0 else 'more'}"


def _rounded_down(percent: float) -> str:
    """With as many decimals as tell it from 100, rounded down: 99.96 must not read as 100.0."""
    decimals = 1 if percent < 99.9 or percent >= 100 else 2 if percent < 99.99 else 3
    scale = 10**decimals
    return f"{int(percent * scale) / scale:.{decimals}f}"
