import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from energy_flow.errors import ConfigError
from energy_flow.training.callbacks.memory_cleanup import DeviceMemory, MemoryCleanup, read_device_memory, trim_host
from tests.training.runs import NO_WARNINGS, TinyModule, loader, scalars, trainer

pytestmark = NO_WARNINGS


class World:
    """Replacements for a clock, a device and a heap. The n-th reading of the clock is n^2 seconds."""

    def __init__(self, allocated: int = 10, reserved: int = 95, total: int = 100) -> None:
        self.allocated, self.reserved, self.total = allocated, reserved, total
        self.batch = 0
        self.ticks = 0
        self.removals: list[int] = []
        self.looks: list[int] = []
        self.releases: list[int] = []
        self.trims: list[int] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.module = SimpleNamespace(processor=self, device=torch.device("cpu"))
        epoch_loop = SimpleNamespace(_batches_that_stepped=0)
        self.trainer: Any = SimpleNamespace(loggers=[self], fit_loop=SimpleNamespace(epoch_loop=epoch_loop))

    def clock(self) -> float:
        self.ticks += 1
        return self.ticks**2  # so that all differences are different

    def cleanup_memory_safe(self) -> int:
        self.removals.append(self.batch)
        return 1000

    def read(self, device: torch.device) -> DeviceMemory:
        self.looks.append(self.batch)
        return DeviceMemory(self.allocated, self.reserved, self.total)

    def release(self) -> None:
        self.releases.append(self.batch)
        self.reserved = self.allocated

    def trim(self) -> int:
        self.trims.append(self.batch)
        return 7

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def callback(self, interval: int = 1, threshold: float = 0.6, **replaced: Any) -> MemoryCleanup:
        parts = {"clock": self.clock, "memory_reader": self.read, "release": self.release, "trim_host": self.trim}
        return MemoryCleanup(interval, threshold, **{**parts, **replaced})

    def run(self, callback: MemoryCleanup, batches: int) -> None:
        for _ in range(batches):
            self.batch += 1
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.batch - 1
            callback.on_train_batch_end(self.trainer, self.module, None, None, 0)
            if callback._trimming is not None:
                callback._trimming.exception()  # wait for the thread, so that there is no race


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _no_peak_reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls: list[str] = []
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_accumulated_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: calls.append(name))
    yield
    assert calls == [], "the peak counters belong to those who report them"


@pytest.mark.parametrize("interval", [1, 3])
def test_acts_at_the_given_batches_only(interval: int) -> None:
    world = World(allocated=95)  # above the threshold, but everything is in use, so only checks happen
    world.run(world.callback(interval), batches=12 * interval)
    assert world.removals == [interval * batch for batch in (2, 4, 6, 8, 10, 12)]
    assert world.trims == world.removals
    assert world.looks == [interval * batch for batch in (4, 8, 12)]
    assert world.releases == []
    assert [step for step, _ in world.logged] == [batch - 1 for batch in world.removals]


def test_other_batches_cost_nothing(world: World) -> None:
    callback = world.callback(interval=5)
    for batch in range(1, 10):
        callback.on_train_batch_end(None, None, None, None, batch)  # type: ignore[arg-type]
    assert (world.ticks, world.removals, world.looks, world.trims) == (0, [], [], [])
    assert callback._executor is None


class TestCache:
    def test_emptied_above_the_raised_threshold(self, world: World) -> None:
        world.run(world.callback(threshold=0.6), batches=4)  # 0.6 * 1.5 * 100 = 90 < 95
        assert world.releases == [4]
        assert world.logged[-1][1]["cleanup/cache_freed_bytes"] == 85

    @pytest.mark.parametrize("reserved", [51, 74, 75])
    def test_kept_up_to_the_threshold(self, reserved: int) -> None:
        world = World(reserved=reserved)
        world.run(world.callback(threshold=0.5), batches=8)  # 0.5 * 1.5 * 100 = 75, exact in binary
        assert world.releases == []
        assert world.looks == [4, 8]
        assert world.logged[-1][1]["cleanup/cache_freed_bytes"] == 0

    def test_kept_if_all_of_it_is_in_use(self) -> None:
        world = World(allocated=95, reserved=95)
        world.run(world.callback(threshold=0.6), batches=8)
        assert world.releases == []

    def test_nothing_without_a_device(self, world: World) -> None:
        world.run(world.callback(memory_reader=lambda device: None), batches=4)
        assert world.releases == []
        assert read_device_memory(torch.device("cpu")) is None


class TestHost:
    def test_result_is_logged_when_it_acts_next(self, world: World) -> None:
        world.run(world.callback(), batches=4)
        first, second = (metrics for _, metrics in world.logged)
        assert "cleanup/host_freed_bytes" not in first
        assert second["cleanup/host_freed_bytes"] == 7

    def test_training_does_not_wait_for_it(self, world: World) -> None:
        leave, threads = threading.Event(), []

        def slow() -> int:
            threads.append(threading.current_thread())
            leave.wait(timeout=60)
            return 7

        callback = world.callback(trim_host=slow)
        for batch in range(1, 7):  # three removals during the first trimming
            callback.on_train_batch_end(world.trainer, world.module, None, None, batch)  # type: ignore[arg-type]
        assert len(world.logged) == 3
        assert not any("cleanup/host_freed_bytes" in metrics for _, metrics in world.logged)
        leave.set()
        callback.teardown(world.trainer, world.module, "fit")  # type: ignore[arg-type]
        assert len(threads) == 1
        assert threads[0] is not threading.main_thread()
        assert not threads[0].is_alive()

    def test_a_failed_trim_raises(self, world: World) -> None:
        def broken() -> int:
            raise OSError("no such heap")

        callback = world.callback(trim_host=broken)
        with pytest.raises(OSError, match="no such heap"):
            world.run(callback, batches=4)
        callback.on_exception(world.trainer, world.module, OSError())  # type: ignore[arg-type]

    def test_trimming_this_process(self) -> None:
        assert trim_host() >= 0


def test_seconds_come_from_the_clock(world: World) -> None:
    world.run(world.callback(), batches=4)
    assert [metrics["time/cleanup"] for _, metrics in world.logged] == [4 - 1, 16 - 9]


def test_totals_at_the_end(world: World, caplog: pytest.LogCaptureFixture) -> None:
    callback = world.callback()
    world.run(callback, batches=4)
    with caplog.at_level(logging.INFO, "energy_flow"):
        callback.teardown(world.trainer, world.module, "fit")  # type: ignore[arg-type]
        callback.teardown(world.trainer, world.module, "test")  # type: ignore[arg-type]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("memory cleanup: 2 removals")
    assert "emptied 1 times" in caplog.messages[0]
    assert "waited 10.000 s" in caplog.messages[0]


def test_the_count_survives_a_resume(world: World) -> None:
    before = world.callback(interval=2)
    world.run(before, batches=3)
    after = world.callback(interval=2)
    after.load_state_dict(before.state_dict())
    world.run(after, batches=1)
    assert world.removals == [4]


@pytest.mark.parametrize(
    ("interval", "threshold", "message"),
    [
        (
            0,
            0.5,
            r"callbacks\.memory_cleanup\.interval = 0: should be greater than or equal to 1; 50 training batches",
        ),
        (True, 0.5, r"callbacks\.memory_cleanup\.interval = true"),
        (1.5, 0.5, r"callbacks\.memory_cleanup\.interval = 1\.5"),
        (
            1,
            0.0,
            r"callbacks\.memory_cleanup\.threshold = 0\.0: should be greater than 0; .* share .* \(0, 2/3\].*Lower it",
        ),
        (1, 0.67, r"callbacks\.memory_cleanup\.threshold = 0\.67"),
        (1, float("nan"), r"callbacks\.memory_cleanup\.threshold = nan"),
    ],
)
def test_values_out_of_range(interval: Any, threshold: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryCleanup(interval, threshold)


def test_two_thirds_is_allowed() -> None:
    MemoryCleanup(1, 2 / 3)


def test_in_a_training_run(tmp_path: Path) -> None:
    module = TinyModule()
    trainer(tmp_path, MemoryCleanup(1, 0.5)).fit(module, loader(6))
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["time/cleanup"]] == [1, 3, 5]
    assert [step for step, _ in logged["cleanup/cache_freed_bytes"]] == [3]
    removed = [value for _, value in logged["cleanup/removed_bytes"]]
    assert len(removed) == 3
    assert min(removed) > 0, "the last batch's landings are kept for inspection until then"
    assert module.processor.last_output is None
