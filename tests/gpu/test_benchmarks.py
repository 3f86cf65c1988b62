"""Measuring on a GPU: what the device does is timed, what the allocator gives is counted."""

import time
from collections.abc import Callable

import pytest
import torch

from energy_flow.settings import read
from energy_flow_benchmarks import collect, stability, step
from energy_flow_benchmarks.measure import compare, peak_memory
from energy_flow_benchmarks.report import EndOfBatch, ReportSettings
from energy_flow_benchmarks.stability import StabilitySettings
from energy_flow_benchmarks.turns import measure_in_turns
from energy_flow_benchmarks.workload import SizeSettings, Workload
from tests.benchmarks.test_report import TINY
from tests.benchmarks.training import tiny_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LIFE = {
    "movement": {"scale": 0.1},
    "noise": {"std": 0.05},
    "spawn": {"enabled": True, "threshold": 0.06},
    "filter": {"enabled": True, "min_displacement": 0.02},
}
CUDA = torch.device("cuda")
MIB = 2**20


def test_work_on_the_device_and_on_the_host_both_count() -> None:
    cycles = 20_000_000  # some milliseconds
    work = {"device": lambda: torch.cuda._sleep(cycles), "host": lambda: time.sleep(0.01), "none": lambda: None}
    seconds = compare(work, CUDA, repeats=2, min_seconds=0)
    assert seconds["device"] > seconds["none"]
    assert seconds["host"] > seconds["none"]


def test_the_peak_is_what_was_held_at_once() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8, device=CUDA)

    def run() -> None:
        for _ in range(3):
            held = [torch.ones(8 * MIB, dtype=torch.uint8, device=CUDA) for _ in range(2)]
            del held

    assert peak_memory(run, CUDA) == 16 * MIB
    assert before.all()


def test_both_sides_give_the_same() -> None:
    batch = EndOfBatch(read(ReportSettings, {**TINY, "flows": [400]}, "benchmark"), 400, CUDA, seed=1)
    rows = batch.rows()  # raises where they don't
    assert {row.variant for row in rows} == {"before", "now"}
    assert all(row.peak_bytes for row in rows if row.case == "peak memory")


def test_ways_to_collect_do_the_same_as_graphs() -> None:
    problem = collect.make_problem(3000, "nearest", 20, CUDA, seed=3)
    expected = collect.forward_backward(collect.ours, problem)
    for name, way in collect.collectors("nearest").items():
        if name in collect.RECORDABLE:
            done: list[tuple[torch.Tensor, ...]] = []
            replay = collect.recorded(lambda way=way, done=done: done.append(collect.forward_backward(way, problem)))
            for tensor in done[-1]:
                tensor.fill_(torch.nan)
            replay()
            collect.require_same(name, expected, done[-1])


def test_all_ways_to_train_agree() -> None:
    size = tiny_size(lattice={"width": 5, "height": 4}, model={"hidden_size": 32})
    workload = Workload.read(SizeSettings(**size), 16, CUDA, seed=2).where_no_flow_ends()
    assert step.GRAPHED in step.steps_of(workload, 2, "float32")
    step.check(workload, batch=2)  # raises where they don't


def test_out_of_memory_is_a_result_and_leaves_room() -> None:
    def build() -> Callable[[], None]:
        held = [torch.empty(2**26, dtype=torch.uint8, device=CUDA)]
        return lambda: held.append(torch.empty(2**60, dtype=torch.uint8, device=CUDA))

    variants = {"too much": build, "enough": lambda: lambda: torch.ones(2**20, device=CUDA)}
    before = torch.cuda.memory_reserved()
    measured = measure_in_turns(variants, CUDA, repeats=2, min_seconds=0)
    assert measured["too much"].seconds is None
    assert measured["enough"].peak_bytes == 4 * MIB
    assert torch.cuda.memory_reserved() <= before


def test_a_long_training_counts_what_the_allocator_did() -> None:
    own = {"size": "small", "lattice": LIFE, "model": {}, "batches": [3, 2], "dtype": "bfloat16"}
    every = {"steps": 30, "warmup_steps": 20, "window": 4, "validate_every": 6, "cleanup_every": 50}
    section = {"name": "stability", "dim": 6, **every, "cpu": own, "cuda": own}
    findings = stability.run(read(StabilitySettings, section, "benchmark"), CUDA, 1, lambda _: None)
    for case in stability.COUNTS:
        counts = [row.count for row in findings.rows if row.case == case]
        assert len(counts) == 2
        assert counts[1] == counts[0], f"{case}: the allocator was asked for more after the warm-up"
