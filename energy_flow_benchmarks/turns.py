"""Measuring variants that don't fit into memory side by side: each is built anew for every turn, and freed after it."""

import logging
import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from energy_flow.core.engine.chunking import is_out_of_memory
from energy_flow_benchmarks.measure import compare, peak_memory
from energy_flow_benchmarks.workload import free

log = logging.getLogger(__name__)

Run = Callable[[], Any]
Build = Callable[[], Run]
Name = TypeVar("Name", bound=Hashable)

WARMUP = {"cuda": 4, "cpu": 1}  # runs before the measurement: on a GPU a rollout runs twice, is recorded, is replayed


@dataclass(frozen=True)
class Measured:
    """Of one variant; None where memory ran out (or the system has no high-water mark)."""

    seconds: float | None
    peak_bytes: int | None  # from before it was built to the end of its first runs


def measure_in_turns(
    variants: Mapping[Name, Build], device: torch.device, *, repeats: int, min_seconds: float
) -> dict[Name, Measured]:
    """Seconds and peak memory of every variant, `repeats` rounds of turns.

    In its turn a variant is built, runs a few times, is measured until `min_seconds` have passed, and is freed. Seconds
    are the median over rounds of a turn's median. The peak is the smallest of all rounds: in the first one compilers
    and libraries take memory of their own. A variant that has run out of memory has no further turns.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in variants}
    peaks: dict[Name, list[int]] = {name: [] for name in variants}
    failed: set[Name] = set()
    for _ in range(repeats):
        for name, build in variants.items():
            if name in failed:
                continue
            taken, peak = _turn(build, device, min_seconds)
            free(device)
            if taken is None:
                failed.add(name)
                continue
            seconds[name].append(taken)
            if peak is not None:
                peaks[name].append(peak)
    return {
        name: Measured(
            statistics.median(seconds[name]) if name not in failed else None,
            min(peaks[name]) if peaks[name] and name not in failed else None,
        )
        for name in variants
    }


def _turn(build: Build, device: torch.device, min_seconds: float) -> tuple[float | None, int | None]:
    """None for the seconds: out of memory."""
    built: list[Run] = []

    def first_runs() -> None:
        run = build()
        built.append(run)
        for _ in range(WARMUP[device.type]):
            run()

    try:
        peak = peak_memory(first_runs, device)
        (taken,) = compare({"it": built[0]}, device, repeats=1, min_seconds=min_seconds, warmup=0).values()
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        log.info("out of memory: %s", error)
        return None, None
    return taken, peak


def _out_of_memory(error: BaseException | None) -> bool:
    """Also where it ended the recording of a graph, which then raises an error of its own."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__context__
    return False
