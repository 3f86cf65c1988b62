"""Numbers on their way from the device to the host, without making the device wait."""

from collections import deque

import torch
from torch import Tensor


class HostCopy:
    """A copy of a device tensor that is under way; on a CPU it is there at once."""

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        value = value.detach()
        if value.device.type != "cuda":
            self._value = value.cpu()
            return
        self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        with torch.cuda.device_of(value):  # whose stream the event is recorded on
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> Tensor:
        """The values, once they are there; waits for the copy, not for work that was queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value


class DelayedScalars:
    """Scalars of single steps, handed over when the device has delivered them: a batch later or so."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, list[str], HostCopy]] = deque()

    def put(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Start copying the scalars of a step."""
        values = torch.stack([value.double() for value in scalars.values()])
        self._waiting.append((step, list(scalars), HostCopy(values)))

    def take(self, *, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """All steps whose scalars have arrived, in order; with `wait`, all steps."""
        taken = []
        while self._waiting and (wait or self._waiting[0][2].ready):
            step, names, copy = self._waiting.popleft()
            taken.append((step, dict(zip(names, copy.wait().tolist(), strict=True))))
        return taken
