"""How many samples run at a time: as many as fit into memory, and half of them after memory has run out."""

import logging
import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_CONTAINER = tuple(  # limit, usage and its details, of Linux control groups version 2 and version 1
    tuple(f"/sys/fs/cgroup/{name}" for name in names)
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    )
)
_SHARE = 0.45  # share of the free memory to use; model, losses and other programs need the rest


class ChunkSizes:
    """Finds the number of samples per chunk, and remembers it.

    Args:
        setting: a number; None for the whole batch; "auto": as many as fit, halved whenever memory runs out.
    """

    def __init__(self, setting: Literal["auto"] | int | None) -> None:
        self._setting = setting
        self._largest: dict[Hashable, int] = {}

    def within_memory(
        self,
        batch: int,
        device: torch.device,
        kind: Hashable,
        bytes_per_sample: Callable[[], int],
        held: Callable[[], int],
        release: Callable[[], None],
        attempt: Callable[[int], Result],
    ) -> Result:
        """Call `attempt` with a chunk size. With "auto", repeat with half the size whenever memory runs out.

        Args:
            batch: B.
            device: where memory is needed.
            kind: of the work. Each kind has its own size: a rollout that keeps a tape needs more memory.
            bytes_per_sample: upper limit of the memory of one sample.
            held: bytes that the rollout's buffers already hold.
            release: frees these buffers.
            attempt: runs the batch with a chunk size.

        Raises:
            RuntimeError: memory ran out, and "auto" can't halve the size; a note names the setting to change.
        """
        while True:
            chunk = self._chunk(batch, device, kind, bytes_per_sample, held)
            try:
                return attempt(chunk)
            except RuntimeError as error:  # `torch.OutOfMemoryError` is one
                if self._setting != "auto" or chunk == 1 or not is_out_of_memory(error):
                    _add_advice(error, self._setting, chunk)
                    raise
            # Outside of `except`: there the error's traceback would still hold the tensors of the attempt.
            release()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            self._largest[device, kind] = -(-chunk // 2)
            log.warning(
                "out of memory on %s with %d samples at a time: repeating the batch with %d (rollout.chunk=auto)",
                device,
                chunk,
                self._largest[device, kind],
            )

    def _chunk(
        self,
        batch: int,
        device: torch.device,
        kind: Hashable,
        bytes_per_sample: Callable[[], int],
        held: Callable[[], int],
    ) -> int:
        if self._setting is None:
            return batch
        if self._setting != "auto":
            return min(batch, self._setting)
        if (device, kind) not in self._largest:
            budget = _SHARE * free_bytes(device) + held()
            self._largest[device, kind] = max(1, int(budget // bytes_per_sample()))
        return _even(batch, min(batch, self._largest[device, kind]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed.

    torch on a CPU, the driver, Triton and cuBLAS raise plain errors instead of `torch.OutOfMemoryError`.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated, with the unused part of the allocator's reserve."""
    if device.type != "cuda":
        return min(psutil.virtual_memory().available, _free_of_container())
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_of_container() -> float:
    """Bytes that this container may still take; without a limit, infinity. Cached files count as free."""
    for limit, used, details in _CONTAINER:
        try:
            free = int(Path(limit).read_text()) - int(Path(used).read_text())
            lines = dict(line.split() for line in Path(details).read_text().splitlines())
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
        files = sum(int(lines.get(f"total_{kind}", lines.get(kind, 0))) for kind in ("inactive_file", "active_file"))
        return max(0, free + files)
    return math.inf


def _even(batch: int, largest: int) -> int:
    """The chunk size that makes chunks as equal as possible: 32 samples of which 30 fit run as 2 x 16."""
    return -(-batch // -(-batch // largest))


def _add_advice(error: BaseException, setting: Literal["auto"] | int | None, chunk: int) -> None:
    if not is_out_of_memory(error):
        return
    if chunk == 1:
        advice = "one sample at a time doesn't fit: set rollout.recompute=true, or a smaller lattice or model"
    else:
        shown = "null" if setting is None else setting
        advice = f"rollout.chunk = {shown}: set rollout.chunk=auto or a number below {chunk}"
    error.add_note(advice)
