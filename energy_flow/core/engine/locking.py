"""A lock for engines whose buffers or modules serve one batch at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class EngineLock:
    """A lock that a thread may take several times. A copy of it, e.g. in a copy of a model, is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EngineLock, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Hold the lock for work on a device. The work first waits for work of the lock on another CUDA stream."""
        with self:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if self._stream is not None and self._stream != stream:
                    stream.wait_stream(self._stream)
                self._stream = stream
            yield
