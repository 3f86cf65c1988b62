"""Memory hygiene: rare, conditional, off the critical path where possible."""

import ctypes
import functools
import logging
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer
from pydantic import field_validator

from energy_flow.settings import Settings, read
from energy_flow.training.callbacks.scalars import log_scalars, logging_step

log = logging.getLogger(__name__)

REMOVE_EVERY = 2  # intervals between two removals
LOOK_EVERY = 4  # intervals between two looks at device memory
RAISE = 1.5  # the threshold is raised by this before the allocator's cache is emptied
MIB = 2**20


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device: held by tensors, held by the allocator, there at all."""

    allocated: int
    reserved: int
    total: int


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """The allocator's counters on the host, read without a sync; None for a device without an allocator cache."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return DeviceMemory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total)


def trim_host() -> int:
    """Give free heap pages back to the system (glibc's `malloc_trim`; a no-op elsewhere).

    Returns:
        By how many bytes the resident memory of the process shrank meanwhile.
    """
    libc = _glibc()
    if libc is None:
        return 0
    process = psutil.Process()
    before = process.memory_info().rss
    libc.malloc_trim(0)
    return max(0, before - process.memory_info().rss)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


class MemoryCleanupSettings(Settings):
    """Config section `callbacks.memory_cleanup`."""

    interval: int
    threshold: float

    @field_validator("interval")
    @classmethod
    def _at_least_one(cls, interval: int) -> int:
        if interval < 1:
            raise ValueError("must be at least 1 training batch; 50 is a good start, null removes the callback")
        return interval

    @field_validator("threshold")
    @classmethod
    def _share(cls, threshold: float) -> float:
        if not 0 < threshold <= 1 / RAISE:
            raise ValueError(
                f"must be a share of the device's memory in (0, 2/3]: the cache is emptied above {RAISE} times it; "
                "lower it, or remove the callback to keep the cache"
            )
        return threshold


@dataclass
class _Totals:
    removals: int = 0
    removed_bytes: int = 0
    releases: int = 0
    cache_freed_bytes: int = 0
    host_freed_bytes: int = 0
    seconds: float = 0.0


class MemoryCleanup(Callback):
    """Frees what is no longer needed, at the end of every few training batches.

    Every `interval` x 2 batches it removes what ended flows still hold (`processor.cleanup_memory_safe()`) and starts
    trimming the heap in a background thread. Every `interval` x 4 it also reads the device's memory and empties the
    allocator's cache, if more than `threshold` x 1.5 of the device is reserved and not all of that is in use. In all
    other batches it compares one integer. The allocator's peak counters are left alone: others report them.

    Logged where it acts: `cleanup/removed_bytes`, `cleanup/cache_freed_bytes` (if it looked),
    `cleanup/host_freed_bytes` (of the trimming that has ended since; the change of the resident memory, so an estimate)
    and `time/cleanup`, the seconds it held up training. Totals go to the log at the end.

    Args:
        interval: training batches, at least 1.
        threshold: share of the device's memory, in (0, 2/3].
        clock: seconds.
        memory_reader: memory of a device, None where there is no cache to empty.
        release: empties the allocator's cache.
        trim_host: trims the heap, returns bytes freed; called in a background thread.

    Raises:
        ConfigError: a value out of its range, with its key.
    """

    def __init__(
        self,
        interval: int,
        threshold: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        memory_reader: Callable[[torch.device], DeviceMemory | None] = read_device_memory,
        release: Callable[[], None] = torch.cuda.empty_cache,
        trim_host: Callable[[], int] = trim_host,
    ) -> None:
        read(MemoryCleanupSettings, {"interval": interval, "threshold": threshold}, "callbacks.memory_cleanup")
        self._remove_every, self._look_every = interval * REMOVE_EVERY, interval * LOOK_EVERY
        self._raised_threshold = threshold * RAISE
        self._clock, self._memory_reader = clock, memory_reader
        self._release, self._trim_host = release, trim_host
        self._batches = 0
        self._totals = _Totals()
        self._executor: ThreadPoolExecutor | None = None
        self._trimming: Future[int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        if self._batches % self._remove_every:
            return
        begin = self._clock()
        scalars = self._clean(pl_module)
        seconds = self._clock() - begin
        self._totals.seconds += seconds
        log_scalars(trainer, {**scalars, "time/cleanup": seconds}, logging_step(trainer))

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self._executor is None:
            return
        self._executor.shutdown(wait=True)
        self._trimmed()
        self._executor = None
        totals, self._totals = self._totals, _Totals()
        log.info(
            "memory cleanup: %d removals freed %.1f MiB, the device cache was emptied %d times (%.1f MiB), "
            "the heap gave back %.1f MiB; training waited %.3f s",
            totals.removals,
            totals.removed_bytes / MIB,
            totals.releases,
            totals.cache_freed_bytes / MIB,
            totals.host_freed_bytes / MIB,
            totals.seconds,
        )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        # Lightning calls no teardown after an exception.
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = self._trimming = None

    def _clean(self, pl_module: Any) -> dict[str, float]:
        removed = pl_module.processor.cleanup_memory_safe()
        self._totals.removals += 1
        self._totals.removed_bytes += removed
        scalars = {"cleanup/removed_bytes": float(removed)}
        if self._batches % self._look_every == 0:
            scalars["cleanup/cache_freed_bytes"] = float(self._release_cache(pl_module.device))
        if self._trimming is None or self._trimming.done():
            freed = self._trimmed()
            if freed is not None:
                scalars["cleanup/host_freed_bytes"] = float(freed)
            self._executor = self._executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="trim-host")
            self._trimming = self._executor.submit(self._trim_host)
        return scalars

    def _release_cache(self, device: torch.device) -> int:
        before = self._memory_reader(device)
        if before is None or before.reserved <= self._raised_threshold * before.total:
            return 0
        if before.reserved <= before.allocated:  # all of it is in use: nothing to give back
            return 0
        self._release()
        after = self._memory_reader(device)
        freed = before.reserved - after.reserved if after is not None else 0
        self._totals.releases += 1
        self._totals.cache_freed_bytes += freed
        return freed

    def _trimmed(self) -> int | None:
        """Bytes freed by the trimming that was started last, None if none was."""
        if self._trimming is None:
            return None
        freed = self._trimming.result()
        self._totals.host_freed_bytes += freed
        self._trimming = None
        return freed
