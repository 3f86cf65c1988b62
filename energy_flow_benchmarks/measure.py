"""Measure alternating variants, median time and peak memory, and compare their results."""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
import torch
from pydantic import Field
from torch import Tensor

from energy_flow.core.engine.chunking import is_out_of_memory
from energy_flow.core.timing import PhaseTimer
from energy_flow.settings import Settings
from energy_flow.training.callbacks.memory_cleanup import trim_host
from energy_flow_benchmarks.findings import Measured

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)]
Clock = Callable[[], float]
Result = TypeVar("Result")

# Unmeasured runs of every turn. On a GPU a rollout runs twice, then records a CUDA graph, then replays it.
WARMUP = {"cuda": 4, "cpu": 1}
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Effort(Settings):
    """How much time a measurement takes."""

    repeats: Count  # rounds
    min_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of one turn


@dataclass(frozen=True)
class Prepared:
    """Work that uses up its input: `setup` makes a new one before every run, unmeasured."""

    setup: Callable[[], Any]
    run: Callable[[Any], Any]


Work = Callable[[], Any] | Prepared
Build = Callable[[], Work]


def measure(
    variants: Mapping[str, Build], device: torch.device, effort: Effort, clock: Clock = time.perf_counter
) -> dict[str, Measured]:
    """Measure time and peak memory of all variants, which alternate for `effort.repeats` rounds.

    A machine drifts: it heats up, and other programs use it too. So each round has one turn per variant. In its turn a
    variant is built, warmed up, timed until `effort.min_seconds` have passed, and freed; only one is in memory at a
    time. A variant that runs out of memory has no further turns.

    Args:
        variants: functions that build the work, by name.
        device: where the work runs.
        effort: rounds, and seconds of a turn.
        clock: returns seconds, for devices without events.

    Returns:
        Seconds: the median over rounds of each turn's median. Peak: the smallest over rounds, because in the first
        round compilers and libraries take memory of their own.
    """
    turns: dict[str, list[Measured]] = {name: [] for name in variants}
    for _ in range(effort.repeats):
        for name, build in variants.items():
            if all(turn.seconds is not None for turn in turns[name]):
                turns[name].append(_turn(build, device, effort.min_seconds, clock))
                free(device)
    return {name: _combined(own) for name, own in turns.items()}


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Return the most bytes that one run holds beyond the memory in use before.

    On CUDA: bytes of tensors, as the allocator rounds them. On a CPU: growth of this process's resident memory, by the
    kernel's high-water mark. So Python objects and autograd nodes count, which are most of it for many small tensors.
    Free memory of the process is first given back to the system. The rest of it makes the result too small, never too
    large.

    Returns:
        None where the system has no high-water mark to reset (other systems than Linux).
    """
    run = ready(work)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    trim_host()
    try:
        _CLEAR_REFS.write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = psutil.Process().memory_info().rss
    kept = run()
    status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    del kept
    return max(0, int(status["VmHWM"].split()[0]) * 1024 - before)


def ready(work: Work) -> Callable[[], Any]:
    """Return one run of the work, prepared."""
    if not isinstance(work, Prepared):
        return work
    subject = work.setup()
    return lambda: work.run(subject)


def recorded(work: Callable[[], Result]) -> Callable[[], Result]:
    """Record work as a CUDA graph. Its replay returns the recorded result, which every replay overwrites."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # compile and set up libraries outside the recording
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def require_near(what: str, expected: Tensor, found: Tensor, tolerance: float, scale: float = 1e-12) -> None:
    """Check that two results agree: max |expected - found| <= tolerance * max(scale, max |expected|).

    Raises:
        RuntimeError: they do not, or their shapes differ; names the result, `what`.
    """
    difference = _difference(what, expected, found) / max(scale, float(expected.detach().abs().max()))
    if not difference <= tolerance:
        raise RuntimeError(
            f"{what} differs from the reference by {difference:.3g} of the largest entry, allowed {tolerance:g}"
        )


def require_within(what: str, expected: Tensor, found: Tensor, limit: float) -> None:
    """Check that two results agree: max |expected - found| <= limit; 0: they are equal.

    Raises:
        RuntimeError: they do not, or their shapes differ; names the result, `what`.
    """
    difference = _difference(what, expected, found)
    if not difference <= limit:
        raise RuntimeError(f"{what} differs from the reference by {difference:.3g}, allowed {limit:g}")


def _difference(what: str, expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise RuntimeError(f"{what} has shape {list(found.shape)}, the reference {list(expected.shape)}")
    return float((expected - found).detach().abs().max())


def free(device: torch.device) -> None:
    """Give unused memory of a GPU back to its driver, the allocator's reserve included."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _turn(build: Build, device: torch.device, min_seconds: float, clock: Clock) -> Measured:
    built: list[Work] = []

    def first_runs() -> None:
        built.append(build())
        for _ in range(WARMUP[device.type]):
            ready(built[0])()

    try:
        peak = peak_memory(first_runs, device)
        return Measured(_median_seconds(built[0], device, min_seconds, clock), peak)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        log.info("out of memory: %s", error)
        return Measured(None)


def _combined(turns: list[Measured]) -> Measured:
    seconds = [turn.seconds for turn in turns if turn.seconds is not None]
    if len(seconds) < len(turns):
        return Measured(None)
    peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
    return Measured(statistics.median(seconds), min(peaks, default=None))


def _median_seconds(work: Work, device: torch.device, min_seconds: float, clock: Clock) -> float:
    """Time runs until `min_seconds` have passed, at least one. As in timeit, no garbage is collected meanwhile."""
    taken: list[float] = []
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        begin = clock()
        while not taken or clock() - begin < min_seconds:
            taken.append(_seconds(ready(work), device, clock))
    finally:
        if was_enabled:
            gc.enable()
    return statistics.median(taken)


def _seconds(run: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    """Time one run. On a GPU: from an idle device to the end of the last kernel; the host's wait does not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    timer = PhaseTimer(device, clock)
    timer.start("run")
    kept = run()
    timer.stop("run")
    del kept  # to free a result takes time that isn't part of the run
    return (timer.seconds(wait=True) or {})["run"]


def _out_of_memory(error: BaseException | None) -> bool:
    """Search the chain of errors: one that ends the recording of a CUDA graph hides behind an error of the graph."""
    while error is not None and not is_out_of_memory(error):
        error = error.__context__
    return error is not None
