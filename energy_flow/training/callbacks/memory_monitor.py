"""Log the memory of the process and of the device."""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from energy_flow.checkpoints.lightning_loops import get_logging_step
from energy_flow.training.callbacks.scalars import is_logging_batch, log_scalars


def read_memory(device: torch.device) -> dict[str, float]:
    """Read the bytes in use, without a sync.

    Returns:
        - `memory/host_rss`: resident memory of this process.
        - On CUDA, `memory/allocated`, `memory/reserved`, `memory/peak` and `memory/inactive_split`: the allocator's
          counters. `peak` is the most that was allocated since the process started, or since the last reset.
          `inactive_split` measures fragmentation: unused memory in blocks that are partly in use.
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
    """Log `read_memory` in every `trainer.log_every_n_steps`-th training batch."""

    def __init__(self, reader: Callable[[torch.device], dict[str, float]] = read_memory) -> None:
        self._reader = reader

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_logging_batch(trainer):
            log_scalars(trainer, self._reader(pl_module.device), get_logging_step(trainer))
