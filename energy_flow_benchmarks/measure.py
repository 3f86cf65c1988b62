"""Measuring: alternating medians of several variants, peak memory, and the rates of the machine itself."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from energy_flow.training.callbacks.memory_cleanup import trim_host

Clock = Callable[[], float]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what clear_refs takes for "forget the peak of the resident memory"


@dataclass(frozen=True)
class Prepared:
    """Work that uses up what it works on: `setup` makes it anew before every run, outside of the measurement."""

    setup: Callable[[], Any]
    run: Callable[[Any], Any]


Work = Callable[[], Any] | Prepared


def compare(
    variants: Mapping[str, Work],
    device: torch.device,
    *,
    repeats: int = 3,
    min_seconds: float = 0.1,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of every variant, measured in one run and in turns.

    A machine drifts: it warms up, and others use it too. So the variants take turns, `repeats` rounds of them; in its
    turn a variant runs until `min_seconds` have passed, at least once. Every single run counts for the median.

    Python's garbage collector rests meanwhile, as in `timeit`. On CUDA a run is timed by events on the device, from an
    idle device to the end of the last kernel: work on the host in between counts, waiting for the host doesn't.

    Args:
        variants: what to measure, by name.
        device: where it runs.
        repeats: rounds.
        min_seconds: time of one turn, preparations included.
        warmup: runs of every variant that don't count.
        clock: seconds, for devices without events.
    """
    timer = _event_seconds if device.type == "cuda" else lambda run: _clock_seconds(run, clock)
    for work, _ in itertools.product(variants.values(), range(warmup)):
        _bound(work)()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _, (name, work) in itertools.product(range(repeats), variants.items()):
        gc.collect()
        begin, enabled = clock(), gc.isenabled()
        gc.disable()
        try:
            while True:
                taken[name].append(timer(_bound(work)))
                if clock() - begin >= min_seconds:
                    break
        finally:
            if enabled:
                gc.enable()
    return {name: statistics.median(runs) for name, runs in taken.items()}


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Most bytes that one run of `work` holds beyond what was there before; a run of its own, not timed.

    On CUDA: what tensors hold of the allocator, as the allocator rounds it. On a CPU: growth of the resident memory of
    this process, by the kernel's own high-water mark. So Python objects, autograd nodes and what the allocator adds to
    every tensor count: for many small tensors they are most of it. Memory that the process held but had free is given
    back first; what of it can't be given back makes the result too small, never too large.

    Returns:
        None where the system keeps no high-water mark that can be reset (anything but Linux).
    """
    run = _bound(work)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    return _resident_growth(run)


def gemm_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, **options: Any) -> float:
    """FLOP/s of the product [m, k] x [k, n]: what this machine can do, measured now. `options` go to `compare`."""
    left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    seconds = compare({"product": lambda: torch.mm(left, right, out=out)}, device, **options)
    return 2 * m * k * n / seconds["product"]


def copy_rate(num_bytes: int, device: torch.device, **options: Any) -> float:
    """Bytes/s of a copy, bytes read and bytes written both counted. `options` go to `compare`."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * num_bytes / compare({"copy": lambda: target.copy_(source)}, device, **options)["copy"]


def _bound(work: Work) -> Callable[[], Any]:
    """One run, prepared."""
    if not isinstance(work, Prepared):
        return work
    subject = work.setup()
    return lambda: work.run(subject)


def _clock_seconds(run: Callable[[], Any], clock: Clock) -> float:
    begin = clock()
    kept = run()
    seconds = clock() - begin
    del kept  # what a run returns is let go outside of the measurement
    return seconds


def _event_seconds(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    kept = run()
    end.record()
    torch.cuda.synchronize()
    del kept
    return begin.elapsed_time(end) / 1000


def _resident_growth(run: Callable[[], Any]) -> int | None:
    trim_host()
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return None
    before = _resident("VmRSS")
    kept = run()
    after = _resident("VmHWM")
    del kept
    return max(0, after - before)


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
