"""Free unused memory: rarely, only if there is something to free, and in the background if possible."""

import ctypes
import functools
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer
from pydantic import Field

from energy_flow.checkpoints.lightning_loops import get_logging_step
from energy_flow.settings import Remedy, checked_arguments
from energy_flow.training.callbacks.scalars import log_scalars

log = logging.getLogger(__name__)

REMOVE_EVERY = 2  # intervals between two removals
CHECK_EVERY = 4  # intervals between two checks of device memory
RAISE = 1.5  # the allocator's cache is emptied above `threshold` times this
MIB = 2**20


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device: held by tensors, held by the allocator, and in total."""

    allocated: int
    reserved: int
    total: int


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Read the allocator's counters on the host, without a sync. None: the device has no allocator cache."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return DeviceMemory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), total)


def trim_host() -> int:
    """Return free heap pages to the system (glibc's `malloc_trim`; does nothing with another libc).

    Returns:
        The decrease of the process's resident memory in bytes.
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


class MemoryCleanup(Callback):
    """Free unused memory at the end of every few training batches.

    - Every `interval` x 2 batches it frees the tensors of ended flows (`processor.cleanup_memory_safe()`), and starts
      to trim the heap in a background thread.
    - Every `interval` x 4 batches it also checks the device's memory. It empties the allocator's cache if more than
      `threshold` x 1.5 of the device is reserved and a part of that is unused.
    - In all other batches it compares one integer.

    It never resets the allocator's peak counters, because other callbacks report them.

    It logs, in the batches above:

    - `cleanup/removed_bytes`: bytes freed by `cleanup_memory_safe`.
    - `cleanup/cache_freed_bytes`: bytes freed by emptying the cache, if the device's memory was checked.
    - `cleanup/host_freed_bytes`: decrease of the resident memory in the last finished trimming, so an estimate.
    - `time/cleanup`: seconds that training waited.

    The totals go to the log at the end.

    Args:
        interval: training batches, at least 1.
        threshold: share of the device's memory, in (0, 2/3].
        clock: returns seconds.
        memory_reader: returns the memory of a device; None if it has no cache to empty.
        release: empties the allocator's cache.
        trim_host: trims the heap and returns the freed bytes; called in a background thread.

    Raises:
        ConfigError: a value is out of range; names its key.
    """

    @checked_arguments("callbacks.memory_cleanup")
    def __init__(
        self,
        interval: Annotated[
            int,
            Field(ge=1),
            Remedy("50 training batches are a good start, callbacks.memory_cleanup=null removes the callback"),
        ],
        threshold: Annotated[
            float,
            Field(gt=0, le=1 / RAISE),
            Remedy(
                "it is a share of the device's memory in (0, 2/3], and the cache is emptied above 1.5 times it. "
                "Lower it, or remove the callback to keep the cache"
            ),
        ],
        *,
        clock: Callable[[], float] = time.perf_counter,
        memory_reader: Callable[[torch.device], DeviceMemory | None] = read_device_memory,
        release: Callable[[], None] = torch.cuda.empty_cache,
        trim_host: Callable[[], int] = trim_host,
    ) -> None:
        self._remove_every, self._check_every = interval * REMOVE_EVERY, interval * CHECK_EVERY
        self._raised_threshold = threshold * RAISE
        self._clock, self._memory_reader = clock, memory_reader
        self._release, self._trim_host = release, trim_host
        self._batches = 0
        self._totals: dict[str, float] = defaultdict(float)  # of all scalars, and of the events
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
        scalars["time/cleanup"] = self._clock() - begin
        log_scalars(trainer, scalars, get_logging_step(trainer))
        for name, value in scalars.items():
            self._totals[name] += value
        self._totals["removals"] += 1

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self._executor is None:
            return
        self._executor.shutdown(wait=True)
        self._executor = None
        totals, self._totals = self._totals, defaultdict(float)
        totals["cleanup/host_freed_bytes"] += self._trimmed() or 0
        log.info(
            "memory cleanup: %d removals freed %.1f MiB, the device cache was emptied %d times (%.1f MiB), "
            "the heap gave back %.1f MiB; training waited %.3f s",
            totals["removals"],
            totals["cleanup/removed_bytes"] / MIB,
            totals["releases"],
            totals["cleanup/cache_freed_bytes"] / MIB,
            totals["cleanup/host_freed_bytes"] / MIB,
            totals["time/cleanup"],
        )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        # After an exception Lightning doesn't call `teardown`.
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = self._trimming = None

    def _clean(self, pl_module: Any) -> dict[str, float]:
        scalars = {"cleanup/removed_bytes": float(pl_module.processor.cleanup_memory_safe())}
        if self._batches % self._check_every == 0:
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
        # At most as much as is allocated: all of it is in use.
        if before is None or before.reserved <= max(self._raised_threshold * before.total, before.allocated):
            return 0
        self._release()
        after = self._memory_reader(device)
        self._totals["releases"] += 1
        return before.reserved - after.reserved if after is not None else 0

    def _trimmed(self) -> int | None:
        """Wait for the last trimming; return the freed bytes, or None if there was no trimming."""
        if self._trimming is None:
            return None
        freed, self._trimming = self._trimming.result(), None
        return freed
