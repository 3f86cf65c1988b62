"""Measuring: alternation and medians with a fake clock, peaks of known size. No test measures real time."""

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow_benchmarks import measure as measuring
from energy_flow_benchmarks.findings import Measured
from energy_flow_benchmarks.machine import describe_machine
from energy_flow_benchmarks.measure import Effort, Prepared, measure, peak_memory, require_near, require_within

CPU = torch.device("cpu")
MIB = 2**20
ONCE = Effort(repeats=1, min_seconds=0.0)
TWICE = Effort(repeats=2, min_seconds=0.0)
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark to reset")


class Watch:
    """A clock that only the measured work advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def build(self, name: str, *seconds: float) -> Callable[[], Callable[[], None]]:
        durations = itertools.cycle(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(durations)

        return lambda: run

    def seconds(self, effort: Effort, **builds: Any) -> dict[str, float | None]:
        return {name: one.seconds for name, one in measure(builds, CPU, effort, self).items()}


def test_variants_alternate_and_warm_up_in_every_turn() -> None:
    watch = Watch()
    watch.seconds(TWICE, a=watch.build("a", 1), b=watch.build("b", 1))
    assert watch.order == ["a", "a", "b", "b"] * 2


def test_a_turn_lasts_for_its_minimum() -> None:
    watch = Watch()
    watch.seconds(Effort(repeats=1, min_seconds=3.0), short=watch.build("short", 1), long=watch.build("long", 10))
    assert watch.order == ["short"] * 4 + ["long"] * 2


def test_the_median_of_a_turn_and_over_the_rounds() -> None:
    watch = Watch()
    three = Effort(repeats=3, min_seconds=0.0)
    assert watch.seconds(three, a=watch.build("a", 0, 1, 0, 100, 0, 2), b=watch.build("b", 5)) == {"a": 2, "b": 5}
    long = Effort(repeats=1, min_seconds=103.0)
    assert watch.seconds(long, a=watch.build("a", 0, 1, 100, 2)) == {"a": 2}


def test_every_run_has_its_own_untimed_setup() -> None:
    watch = Watch()
    made: list[int] = []

    def setup() -> int:
        watch.now += 50
        made.append(len(made))
        return made[-1]

    def run(subject: int) -> None:
        watch.now += 1
        watch.order.append(str(subject))

    assert watch.seconds(TWICE, it=lambda: Prepared(setup, run)) == {"it": 1}
    assert watch.order == ["0", "1", "2", "3"]


def test_variants_are_freed_after_their_turn() -> None:
    seen: list[str] = []

    class Built:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> None:
            seen.append(f"run {self.name}")

        def __del__(self) -> None:
            seen.append(f"free {self.name}")

    measure({name: lambda name=name: Built(name) for name in "ab"}, CPU, TWICE)
    assert seen == [f"{what} {name}" for name in "ab" for what in ("run", "run", "free")] * 2


def test_the_garbage_collector_is_off_during_a_turn() -> None:
    states: list[bool] = []

    def broken() -> None:
        states.append(gc.isenabled())
        if not states[-1]:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        measure({"it": lambda: broken}, CPU, ONCE)
    assert states == [True, False]
    assert gc.isenabled()


def test_a_garbage_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        measure({"it": lambda: lambda: None}, CPU, ONCE)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("inside", [False, True], ids=["as it is", "behind another error"])
def test_out_of_memory_is_a_result(inside: bool) -> None:
    built = []

    def run() -> None:
        try:
            raise torch.OutOfMemoryError("too much")
        finally:
            if inside:
                raise RuntimeError("the recording was not ended")

    def build() -> Callable[[], None]:
        built.append(1)
        return run

    found = measure({"it": build, "other": lambda: lambda: None}, CPU, TWICE)
    assert found["it"] == Measured(None, None)
    assert found["other"].seconds is not None
    assert len(built) == 1, "no further turns"


def test_other_errors_are_errors() -> None:
    def run() -> None:
        raise RuntimeError("wrong shapes")

    with pytest.raises(RuntimeError, match="wrong shapes"):
        measure({"it": lambda: run}, CPU, ONCE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2), r"it has shape \[2\], the reference \[3\]"),
        (torch.tensor([1.0, 2.0, 3.1]), "it differs from the reference by 0.0333 of the largest entry, allowed 0.01"),
        (torch.full((3,), torch.nan), "it differs from the reference by nan"),
    ],
)
def test_results_that_differ_are_refused(wrong: torch.Tensor, message: str) -> None:
    right = torch.tensor([1.0, 2.0, 3.0])
    require_near("it", right, right + 0.01, 0.01)
    with pytest.raises(RuntimeError, match=message):
        require_near("it", right, wrong, 0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2), r"it has shape \[2\], the reference \[3\]"),
        (torch.tensor([100.0, 2.0, 3.1]), "it differs from the reference by 0.1, allowed 0.01"),
        (torch.full((3,), torch.nan), "it differs from the reference by nan"),
    ],
)
def test_results_that_differ_by_more_than_a_limit_are_refused(wrong: torch.Tensor, message: str) -> None:
    right = torch.tensor([100.0, 2.0, 3.0])
    require_within("it", right, right + 0.005, 0.01)
    require_within("it", right, right.clone(), 0.0)
    with pytest.raises(RuntimeError, match=message):
        require_within("it", right, wrong, 0.01)


def test_a_rate_needs_a_time() -> None:
    assert Measured(2.0).rate(10) == 5
    with pytest.raises(RuntimeError, match="out of memory"):
        Measured(None).rate(10)


@LINUX
def test_the_peak_counts_from_before_a_variant_is_built() -> None:
    def large() -> Callable[[], Any]:
        held = torch.ones(2**24)  # 64 MiB
        return lambda: held

    found = measure({"none": lambda: lambda: None, "large": large}, CPU, TWICE)
    none, peak = found["none"].peak_bytes, found["large"].peak_bytes
    assert none is not None
    assert peak is not None
    assert none < 8 * MIB
    assert 63 * MIB <= peak < 72 * MIB


@LINUX
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_peak_is_the_memory_held_at_once(blocks: int) -> None:
    size = 64 * MIB  # large enough for the allocator to return it to the system at once

    def run() -> None:
        for _ in range(3):
            held = [torch.ones(size, dtype=torch.uint8) for _ in range(blocks)]
            del held

    peak = peak_memory(run, CPU)
    assert peak is not None
    assert blocks * size - MIB <= peak <= blocks * size + 4 * MIB, "pages of other things that happen meanwhile"


@LINUX
def test_the_peak_counts_objects_but_no_earlier_memory() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    count = 20_000
    peak = peak_memory(lambda: [torch.zeros(1) for _ in range(count)], CPU)
    assert peak is not None
    assert 200 * count < peak < 2000 * count, "4 bytes of numbers each, and some hundred bytes of the tensor object"
    assert before.numel() == 64 * MIB


def test_a_system_without_a_peak_counter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measuring, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    ran: list[int] = []
    assert peak_memory(lambda: ran.append(1), CPU) is None
    assert ran == []


def test_the_machine_is_described() -> None:
    machine = describe_machine(CPU, "python -m energy_flow.benchmark seed=2")
    names = {"cpu", "cores", "threads", "gpu", "torch", "triton", "python", "energy_flow", "date", "command"}
    assert machine.keys() == names
    assert machine["threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    assert machine["command"] == "python -m energy_flow.benchmark seed=2"
