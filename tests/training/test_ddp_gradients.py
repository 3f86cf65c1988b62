"""Several processes have the gradients of one process with the joined batch, with one synchronisation per step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch import distributed as dist
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from tests.helpers import assert_near
from tests.training.test_module import LIVELY, make_module, make_rows, make_trainer

PROCESSES, ACCUMULATED, OPTIMIZER_STEPS, BATCH = 2, 2, 2, 6
NUM_ROWS = BATCH * ACCUMULATED * OPTIMIZER_STEPS
ROLLOUT = ("rollout.engine=tape", "rollout.chunk=2", "rollout.compaction=true")
TOLERANCE = 1e-10  # of float64, because sums over samples run in another order


class Recorder(Callback):
    """Record the gradients of the first optimiser step, and the number of synchronisations before each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gradients: list[dict[str, Tensor]] = []
        self.synchronised = [0]
        self.spawned = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, self.count)

    def count(self, state: None, bucket: GradBucket) -> Future[Tensor]:
        self.synchronised[-1] += bucket.is_last()  # of the buckets into which gradients are packed
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.spawned += float(pl_module.processor.last_output.statistics["spawned"])
        named = pl_module.named_parameters()
        self.gradients.append({name: parameter.grad.clone() for name, parameter in named})
        self.synchronised.append(0)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {"gradients": self.gradients, "synchronised": self.synchronised, "spawned": self.spawned}
        torch.save(found, f"{self.path}.{trainer.global_rank}")


class Shares(Sampler[int]):
    """A loader that gives every process its part of each joined batch, in order."""

    def __init__(self, processes: int) -> None:
        self.share = BATCH // processes

    def __iter__(self) -> Iterator[int]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for start in range(rank * self.share, NUM_ROWS, BATCH):
            yield from range(start, start + self.share)

    def __len__(self) -> int:
        return NUM_ROWS // BATCH * self.share


def fit(folder: Path, processes: int, *overrides: str) -> list[dict[str, Any]]:
    """Train, and return the records of each process."""
    path = folder / str(processes)
    trainer = make_trainer(
        Recorder(path),
        devices=processes,
        strategy="ddp_spawn" if processes > 1 else "auto",
        precision="64-true",
        accumulate_grad_batches=ACCUMULATED,
        use_distributed_sampler=False,
    )
    module = make_module(*LIVELY, *ROLLOUT, "loss=combined", "loss.contrastive=1.0", *overrides)
    shares = Shares(processes)
    loader = DataLoader(make_rows(NUM_ROWS), batch_size=shares.share, sampler=shares)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    [one], (first, second) = fit(tmp_path, 1), fit(tmp_path, PROCESSES)
    assert one["spawned"] > 0
    assert len(one["gradients"]) == OPTIMIZER_STEPS
    # The second step too: after the first step, both processes had the same weights.
    for step in range(OPTIMIZER_STEPS):
        for name, expected in one["gradients"][step].items():
            assert expected.abs().max() > 1e-9, name
            assert torch.equal(first["gradients"][step][name], second["gradients"][step][name]), name
            scale = expected.abs().max()  # relative to the largest entry
            found = first["gradients"][step][name]
            assert_near(found / scale, expected / scale, TOLERANCE, f"gradient of {name}, optimiser step {step}")
    for process in (first, second):
        assert process["synchronised"] == [1] * OPTIMIZER_STEPS + [0], "once per step, not once per batch"
