"""Buffers that are allocated once and reused."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Clearable(Protocol):
    """Relies on the addresses of buffers."""

    def clear(self) -> None:
        """Drop everything that uses the addresses."""


class TensorPool:
    """Named buffers that are allocated once and reused. They grow on demand and shrink when trimmed.

    A buffer is scratch memory: it never leaves the rollout, and autograd never saves it.

    Attributes:
        dependants: objects that rely on the addresses of the buffers. The pool clears them before it frees a buffer.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._needed: dict[tuple[str, torch.dtype, torch.device], int] = {}
        self.dependants: list[Clearable] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": {}, "_needed": {}}  # a copy starts empty

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer `name` as a tensor of `shape`, with arbitrary values. A second call returns the same memory."""
        key = (name, dtype, device)
        size = math.prod(shape)
        self._needed[key] = max(size, self._needed.get(key, 0))
        if key in self._buffers and self._buffers[key].numel() < size:
            self._release(key)
        if key not in self._buffers:
            self._buffers[key] = _plain_buffer(size, dtype, device)
        return self._buffers[key][:size].view(shape)

    def clear(self) -> None:
        """Free all buffers."""
        for key in list(self._buffers):
            self._release(key)

    def trim(self) -> int:
        """Shrink every buffer to the largest size that was taken since the last call.

        Returns:
            The bytes freed.
        """
        before = self.nbytes
        for key in list(self._buffers):
            needed = self._needed.get(key, 0)
            if needed == self._buffers[key].numel():
                continue
            self._release(key)
            if needed > 0:
                self._buffers[key] = _plain_buffer(needed, key[1], key[2])
        self._needed.clear()
        return before - self.nbytes

    def _release(self, key: tuple[str, torch.dtype, torch.device]) -> None:
        for dependant in self.dependants:
            dependant.clear()
        del self._buffers[key]


def _plain_buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Never an inference tensor, even if inference mode asks first: training could not write to it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)
