"""The time of the parts of a forward pass, measured without waiting for the device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Measures the seconds of named phases: place, propagate, collect, aggregate, and any others.

    Times of a phase that runs several times add up. On CUDA a phase is a pair of events on the current stream, and
    nothing waits for them. Other devices use the clock.

    Args:
        device: where the work of the phases runs.
        clock: returns seconds, for devices without events.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._on_cuda = device.type == "cuda"
        self._open: dict[str, float | torch.cuda.Event] = {}
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to phase `name`."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def start(self, name: str) -> None:
        """Start phase `name`, where the phase is no block, such as the trainer's backward pass."""
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        """End phase `name`.

        Raises:
            KeyError: the phase hasn't started.
        """
        begin, end = self._open.pop(name), self._mark()
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((name, begin, end))
        elif isinstance(begin, float) and isinstance(end, float):
            self._add(name, end - begin)

    def seconds(self, *, wait: bool = False) -> dict[str, float] | None:
        """The seconds of every finished phase; None while the device is still working on one.

        Args:
            wait: wait for the device; for the end of a run only.
        """
        if wait:
            for _, _, end in self._events:
                end.synchronize()
        elif not all(end.query() for _, _, end in self._events):
            return None
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._seconds)

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
