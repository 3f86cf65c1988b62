from pathlib import Path

import pytest
import torch

from energy_flow.training.callbacks.memory_monitor import MemoryMonitor, read_memory
from tests.training.runs import NO_WARNINGS, TinyModule, loader, scalars, trainer

pytestmark = NO_WARNINGS


def test_logs_at_every_nth_batch_and_reads_at_no_other(tmp_path: Path) -> None:
    reads: list[torch.device] = []

    def reader(device: torch.device) -> dict[str, float]:
        reads.append(device)
        return {"memory/host_rss": float(len(reads)), "memory/peak": 5.0}

    trainer(tmp_path, MemoryMonitor(reader), log_every_n_steps=2).fit(TinyModule(), loader(5))
    logged = scalars(tmp_path)
    assert logged["memory/host_rss"] == [(1, 1.0), (3, 2.0)]
    assert logged["memory/peak"] == [(1, 5.0), (3, 5.0)]
    assert reads == [torch.device("cpu")] * 2


def test_host_memory_of_this_process() -> None:
    before = read_memory(torch.device("cpu"))
    block = torch.ones(32 * 2**20, dtype=torch.uint8)
    after = read_memory(torch.device("cpu"))
    assert before.keys() == {"memory/host_rss"}
    assert after["memory/host_rss"] - before["memory/host_rss"] > block.nbytes / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory() -> None:
    device = torch.device("cuda")
    block = torch.ones(2**20, device=device)
    memory = read_memory(device)
    assert memory["memory/allocated"] >= block.nbytes
    assert memory["memory/peak"] >= memory["memory/allocated"]
    assert memory["memory/reserved"] >= memory["memory/allocated"]
    assert memory["memory/inactive_split"] >= 0
