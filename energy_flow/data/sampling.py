"""The order of training rows: it depends on seed and epoch alone, also in resumed runs and with several processes."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from energy_flow.data.samples import Samples

_SIGNAL_SECONDS = 0.5  # within which the signal of a dead worker arrives


def epoch_sampler(dataset: Samples, seed: int, batch_size: int, num_processes: int, process: int) -> DistributedSampler:
    """Shuffle rows by (seed, epoch) alone; every process takes its share of one common order.

    Batch i of P processes together is therefore batch i of one process with P times the batch size. Lightning calls
    `set_epoch` at the start of every epoch, and doesn't replace a `DistributedSampler` under DDP.
    """
    return DistributedSampler(
        dataset,
        num_replicas=num_processes,
        rank=process,
        shuffle=True,
        # The sampler shuffles by seed + epoch. Spread seeds: epoch 1 of seed 0 must not be epoch 0 of seed 1.
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        # If there is a full batch, the loader drops the incomplete one, so no row needs to be repeated.
        drop_last=len(dataset) // num_processes >= batch_size,
    )


class ResumableLoader(DataLoader):
    """A loader that continues in the middle of an epoch: a resumed run skips the batches that it was trained on.

    `batches_done` returns their number. Lightning's checkpoints have this count, so the loader saves no state. It can't
    rely on `load_state_dict`: Lightning skips the call if the loaders were used before the checkpoint was read, as
    `trainer.estimated_stepping_batches` does.
    """

    batches_done: Callable[[], int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator reads nothing before the first `next`. By then Lightning has set the sampler's epoch and restored
        # its counts. Workers started by `iter` would already have prefetched the first rows of epoch 0.
        done = self.batches_done() if self.batches_done is not None else 0
        try:
            yield from islice(super().__iter__(), done, None)
        except (ConnectionError, EOFError):
            # A worker died while it passed a batch. Its signal arrives a moment later, and PyTorch then raises a
            # clearer error wherever the code is. Wait here, so that it does not interrupt the cleanup of this error.
            time.sleep(_SIGNAL_SECONDS)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Empty, see the class. Lightning takes the method as a sign that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""
