"""Copies from the device to the host that don't make the host wait."""

from collections import deque

import torch
from torch import Tensor


class HostCopy:
    """A copy of a device tensor that is under way. A tensor on a CPU isn't copied: it is there at once.

    Args:
        value: any shape. Don't change it before `wait`.
    """

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        value = value.detach()
        if value.device.type != "cuda":
            self._value = value.cpu()
            return
        self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        with torch.cuda.device_of(value):  # the event is recorded on the stream of the current device
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> Tensor:
        """Wait for the copy, but not for work queued after it, and return the values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value


class DelayedScalars:
    """Scalars of training steps, which arrive on the host about one batch later."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, list[str], HostCopy]] = deque()

    def put(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Start to copy the scalars of a step."""
        values = torch.stack([value.double() for value in scalars.values()])
        self._waiting.append((step, list(scalars), HostCopy(values)))

    def take(self, *, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Steps whose scalars have arrived, in order; with `wait`, all steps."""
        taken = []
        while self._waiting and (wait or self._waiting[0][2].ready):
            step, names, copy = self._waiting.popleft()
            taken.append((step, dict(zip(names, copy.wait().tolist(), strict=True))))
        return taken
