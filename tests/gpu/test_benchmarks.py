"""Measuring on a GPU: what the device does is timed, what the allocator gives is counted."""

import time

import pytest
import torch

from energy_flow.benchmarks.measure import compare, peak_memory
from energy_flow.benchmarks.report import EndOfBatch, ReportSettings
from energy_flow.settings import read
from tests.benchmarks.test_report import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

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
