"""Memory of the process and of the device, as scalars."""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from energy_flow.training.callbacks.scalars import is_logging_batch, log_scalars, logging_step


def read_memory(device: torch.device) -> dict[str, float]:
    """Bytes in use: resident memory of this process and, on CUDA, the allocator's counters on the host (no sync).

    `peak` is the most that was allocated since the process began (or since someone reset it); `inactive_split` lies
    in blocks that are partly in use, so it can neither be given back nor, often, be used: fragmentation.
    """
    memory = {"memory/host_rss": float(psutil.Process().memory_info().rss)}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        memory["memory/allocated"] = float(stats["allocated_bytes.all.current"])
        memory["memory/reserved"] = float(stats["reserved_bytes.all.current"])
        memory["memory/peak"] = float(stats["allocated_bytes.all.peak"])
        memory["memory/inactive_split"] = float(stats["inactive_split_bytes.all.current"])
    return memory


class MemoryMonitor(Callback):
    """Logs `read_memory` at every `trainer.log_every_n_steps`-th training batch."""

    def __init__(self, reader: Callable[[torch.device], dict[str, float]] = read_memory) -> None:
        self._reader = reader

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_logging_batch(trainer):
            log_scalars(trainer, self._reader(pl_module.device), logging_step(trainer))
