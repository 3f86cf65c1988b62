"""The order of the training rows: the same for the same seed and epoch, also resumed and on several processes."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from energy_flow.data.samples import Samples

_SIGNAL_SECONDS = 0.5  # in which the end of a worker is heard of


def epoch_sampler(dataset: Samples, seed: int, batch_size: int, num_processes: int, process: int) -> DistributedSampler:
    """Rows shuffled by (seed, epoch) alone; every process takes its share of one common order.

    So the joined batch i of P processes is batch i of one process with P times the batch size. Lightning calls
    `set_epoch` at the start of every epoch, and leaves a `DistributedSampler` as it is under DDP.
    """
    return DistributedSampler(
        dataset,
        num_replicas=num_processes,
        rank=process,
        shuffle=True,
        # The sampler shuffles by seed + epoch; spread, so that epoch 1 of seed 0 isn't epoch 0 of seed 1.
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        # Where a full batch exists the last incomplete one is left out anyway; no row needs to be repeated then.
        drop_last=len(dataset) // num_processes >= batch_size,
    )


class ResumableLoader(DataLoader):
    """Goes on in the middle of an epoch: a restored run leaves out the batches that it has already trained on.

    `batches_done` tells how many those are. Lightning keeps that count in its checkpoints, so this loader saves nothing
    of its own. Nor does it wait for `load_state_dict`, which Lightning leaves out where something asked for the loaders
    before the checkpoint was read, as `trainer.estimated_stepping_batches` does.
    """

    batches_done: Callable[[], int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is read before the first batch is asked for. By then Lightning has told the sampler the
        # epoch and restored its counts; workers started by `iter` would have prefetched the first rows of epoch 0.
        done = self.batches_done() if self.batches_done is not None else 0
        try:
            yield from islice(super().__iter__(), done, None)
        except (ConnectionError, EOFError):
            # A worker ended while it handed over a batch. PyTorch raises that where the signal arrives, a moment later:
            # here, and not among those who clean up after this error.
            time.sleep(_SIGNAL_SECONDS)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Empty: see the class. That it is there tells Lightning that this loader can go on in the middle."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""
