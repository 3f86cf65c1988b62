"""Measuring: turns and medians by a clock of our own, peaks of known size. Never how long something takes."""

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow_benchmarks import measure
from energy_flow_benchmarks.machine import describe_machine
from energy_flow_benchmarks.measure import Prepared, compare, copy_rate, gemm_rate, peak_memory

CPU = torch.device("cpu")
MIB = 2**20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")


class Watch:
    """A clock that work moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Any:
        durations = itertools.cycle(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(durations)

        return run


def test_variants_take_turns_after_their_warm_up() -> None:
    watch = Watch()
    compare({"a": watch.work("a", 1), "b": watch.work("b", 1)}, CPU, repeats=3, min_seconds=0, warmup=2, clock=watch)
    assert watch.order == ["a", "a", "b", "b", *("a", "b") * 3]


def test_a_turn_lasts_for_its_minimum() -> None:
    watch = Watch()
    work = {"short": watch.work("short", 1), "long": watch.work("long", 10)}
    compare(work, CPU, repeats=1, min_seconds=3, warmup=0, clock=watch)
    assert watch.order == ["short"] * 3 + ["long"]


def test_the_median_of_all_runs() -> None:
    watch = Watch()
    work = {"uneven": watch.work("uneven", 1, 100, 2), "even": watch.work("even", 5)}
    seconds = compare(work, CPU, repeats=3, min_seconds=0, warmup=0, clock=watch)
    assert seconds == {"uneven": 2, "even": 5}


def test_preparations_do_not_count_and_are_made_for_every_run() -> None:
    watch = Watch()
    made = []

    def setup() -> int:
        watch.now += 50
        made.append(len(made))
        return made[-1]

    def run(subject: int) -> None:
        watch.now += 1
        watch.order.append(str(subject))

    assert compare({"it": Prepared(setup, run)}, CPU, repeats=3, min_seconds=0, warmup=1, clock=watch) == {"it": 1}
    assert watch.order == ["0", "1", "2", "3"]


def test_the_garbage_collector_rests_and_wakes_up_again() -> None:
    states = []
    compare({"it": lambda: states.append(gc.isenabled())}, CPU, repeats=1, min_seconds=0, warmup=0)
    assert states == [False]
    assert gc.isenabled()

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        compare({"it": broken}, CPU, repeats=1, min_seconds=0, warmup=0)
    assert gc.isenabled()


@LINUX
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_peak_is_what_was_held_at_once(blocks: int) -> None:
    size = 64 * MIB  # large enough to be given back to the system at once

    def run() -> None:
        for _ in range(3):  # one after the other: only what is there together counts
            held = [torch.ones(size, dtype=torch.uint8) for _ in range(blocks)]
            del held

    peak = peak_memory(run, CPU)
    assert peak is not None
    assert blocks * size - MIB <= peak <= blocks * size + 4 * MIB, "pages of other things that happen meanwhile"


@LINUX
def test_objects_count_and_what_was_there_before_does_not() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    count = 20_000
    peak = peak_memory(lambda: [torch.zeros(1) for _ in range(count)], CPU)
    assert peak is not None
    assert 200 * count < peak < 2000 * count, "4 bytes of numbers each, and some hundred of what makes them tensors"
    assert before.numel() == 64 * MIB


def test_a_system_without_a_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_RESET", tmp_path / "nowhere" / "clear_refs")
    ran: list[int] = []
    assert peak_memory(lambda: ran.append(1), CPU) is None
    assert ran == []


def test_rates_are_work_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def two_seconds(variants: dict[str, Any], device: torch.device, **options: Any) -> dict[str, float]:
        ran.extend(work() for work in variants.values())
        assert options == {"repeats": 7}
        return dict.fromkeys(variants, 2.0)

    monkeypatch.setattr(measure, "compare", two_seconds)
    assert gemm_rate(3, 5, 7, torch.bfloat16, CPU, repeats=7) == 3 * 5 * 7
    assert copy_rate(1000, CPU, repeats=7) == 1000
    product, copied = ran
    assert (product.shape, product.dtype) == ((3, 7), torch.bfloat16)
    assert not copied.any()


def test_rates_are_measured() -> None:
    assert gemm_rate(8, 8, 8, torch.float32, CPU, repeats=1, min_seconds=0) > 0
    assert copy_rate(1000, CPU, repeats=1, min_seconds=0) > 0


def test_the_machine_is_described() -> None:
    machine = describe_machine(CPU, "python -m energy_flow.benchmark seed=2")
    names = {"cpu", "cores", "threads", "gpu", "torch", "triton", "python", "energy_flow", "date", "command"}
    assert machine.keys() == names
    assert machine["threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    assert machine["command"] == "python -m energy_flow.benchmark seed=2"
