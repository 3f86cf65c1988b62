"""Measuring on a GPU: device time and the bytes of the device's allocator."""

import time
from collections.abc import Callable

import pytest
import torch

from energy_flow.settings import read
from energy_flow_benchmarks import collect, stability, step
from energy_flow_benchmarks.end_of_batch import EndOfBatch
from energy_flow_benchmarks.measure import Effort, measure, peak_memory
from energy_flow_benchmarks.stability import StabilitySettings
from energy_flow_benchmarks.workload import SizeSettings, Workload
from tests.benchmarks.training import tiny_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHANGES = {
    "movement": {"scale": 0.1},
    "noise": {"std": 0.05},
    "spawn": {"enabled": True, "threshold": 0.06},
    "filter": {"enabled": True, "min_displacement": 0.02},
}
CUDA = torch.device("cuda")
TWICE = Effort(repeats=2, min_seconds=0.0)
MIB = 2**20


def test_work_on_the_device_and_on_the_host_both_count() -> None:
    cycles = 20_000_000  # some milliseconds
    builds = {
        "device": lambda: lambda: torch.cuda._sleep(cycles),
        "host": lambda: lambda: time.sleep(0.01),
        "none": lambda: lambda: None,
    }
    found = measure(builds, CUDA, TWICE)
    assert found["device"].seconds > found["none"].seconds
    assert found["host"].seconds > found["none"].seconds


def test_the_peak_is_the_memory_held_at_once() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8, device=CUDA)

    def run() -> None:
        for _ in range(3):
            held = [torch.ones(8 * MIB, dtype=torch.uint8, device=CUDA) for _ in range(2)]
            del held

    assert peak_memory(run, CUDA) == 16 * MIB
    assert before.all()


def test_both_sides_give_the_same() -> None:
    rows = EndOfBatch(400, 4, 2, 3, CUDA, seed=1).rows(Effort(repeats=1, min_seconds=0.0))  # raises for a difference
    assert {row.variant for row in rows} == {"before", "now"}
    assert all(row.peak_bytes for row in rows if row.case == "peak memory")


def test_methods_of_collection_do_the_same_as_graphs() -> None:
    problem = collect.make_problem(3000, "nearest", 20, CUDA, seed=3)
    expected = collect.forward_backward(collect.ours, problem)
    for name, method in collect.methods("nearest").items():
        if name in collect.RECORDABLE:
            done: list[tuple[torch.Tensor, ...]] = []
            replay = collect.recorded(
                lambda method=method, done=done: done.append(collect.forward_backward(method, problem))
            )
            for tensor in done[-1]:
                tensor.fill_(torch.nan)
            replay()
            collect.require_same(name, expected, done[-1])


def test_graphs_are_measured_as_variants_of_their_own() -> None:
    section = {"landings": [30], "cuda_landings": [40], "lattice_width": 4, "repeats": 1, "min_seconds": 0.0}
    settings = read(collect.CollectSettings, {"name": "collect", **section}, "benchmark")
    findings = collect.run(settings, CUDA, 1, lambda _: None)
    for row in findings.rows:
        assert row.seconds
        assert row.size in (30, 40)
    graphs = {row.variant for row in findings.rows if row.variant.endswith(collect.AS_GRAPH)}
    assert {collect.OURS + collect.AS_GRAPH, collect.BOUNDED + collect.AS_GRAPH} <= graphs


def test_all_variants_of_a_step_agree() -> None:
    size = tiny_size(lattice={"width": 5, "height": 4}, model={"hidden_size": 32})
    workload = Workload.read(SizeSettings(**size), 16, CUDA, seed=2).where_no_flow_ends()
    assert step.GRAPHED in step.steps_of(workload, 2, "float32")
    step.check(workload, batch=2)  # raises for a difference


def test_out_of_memory_is_a_result_and_leaves_room() -> None:
    def build() -> Callable[[], None]:
        held = [torch.empty(2**26, dtype=torch.uint8, device=CUDA)]
        return lambda: held.append(torch.empty(2**60, dtype=torch.uint8, device=CUDA))

    variants = {"too much": build, "enough": lambda: lambda: torch.ones(2**20, device=CUDA)}
    before = torch.cuda.memory_reserved()
    measured = measure(variants, CUDA, TWICE)
    assert measured["too much"].seconds is None
    assert measured["enough"].peak_bytes == 4 * MIB
    assert torch.cuda.memory_reserved() <= before


def test_a_long_training_counts_the_allocators_events() -> None:
    own = {"size": "small", "lattice": CHANGES, "model": {}, "batches": [3, 2], "dtype": "bfloat16"}
    every = {"steps": 30, "warmup_steps": 20, "window": 4, "validate_every": 6, "cleanup_every": 50}
    section = {"name": "stability", "dim": 6, **every, "cpu": own, "cuda": own}
    findings = stability.run(read(StabilitySettings, section, "benchmark"), CUDA, 1, lambda _: None)
    for case in stability.COUNTS:
        counts = [row.count for row in findings.rows if row.case == case]
        assert len(counts) == 2
        assert counts[1] == counts[0], f"{case}: the allocator was asked for more after the warm-up"
