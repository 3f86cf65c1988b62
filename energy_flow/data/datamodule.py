"""The data of a run: its three splits and their loaders."""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Mapping
from typing import Any, Self

import psutil
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from energy_flow.data.kinds import read_data_settings
from energy_flow.data.samples import Batch, Samples
from energy_flow.data.sampling import ResumableLoader, epoch_sampler
from energy_flow.data.settings import SPLITS, DataSettings, misfits, missing_splits
from energy_flow.data.storage.duplicates import Hashes, duplicate_warnings
from energy_flow.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_info, _warn = rank_zero_only(log.info), rank_zero_only(log.warning)

_WORKER = "pt_data_worker"  # PyTorch's name of its worker processes


class EnergyDataModule(LightningDataModule):
    """Pairs of embeddings for training, validation and test.

    `setup` checks all data before training starts. Batches are dicts: source and target float32 [B, D], row int64 [B].
    Training rows are shuffled by (seed, epoch). An incomplete last training batch is left out unless it is the only
    one, because in-batch negatives of a few rows are mostly noise.

    Attributes:
        train, val, test: the data sets after `setup`; None: no such split.
        fingerprint: sha256 (hex) by split, after `setup`.
    """

    def __init__(self, settings: DataSettings) -> None:
        super().__init__()
        self.settings = settings
        self.train: Samples | None = None
        self.val: Samples | None = None
        self.test: Samples | None = None
        self.fingerprint: dict[str, str] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Create the data of a config from `energy_flow.config.compose()`."""
        return cls(read_data_settings(config["data"]))

    @property
    def loaders(self) -> Self:
        """The module that Lightning gets."""
        return self

    @property
    def has_test(self) -> bool:
        """Whether there is a test split."""
        return self.test is not None

    def num_batches(self) -> int:
        """The number of training batches of an epoch."""
        return len(self.train_dataloader())

    def describe(self) -> str:
        """The data in one line, after `setup`."""
        pairs = ", ".join(f"{len(split):,} {name}" for name, split in self.splits().items())
        return f"{pairs} pairs of dimension {self.dim}"

    @property
    def dim(self) -> int:
        """D, the embedding dimension of all splits, after `setup`."""
        return next(iter(self.splits().values())).dim

    def splits(self) -> dict[str, Samples]:
        """The existing data sets by split, after `setup`."""
        loaded = {split: dataset for split in SPLITS if (dataset := getattr(self, split)) is not None}
        if not loaded:
            raise RuntimeError("no data yet: call setup() first")
        return loaded

    def setup(self, stage: str | None = None) -> None:
        """Open and check all existing splits.

        Raises:
            ConfigError: a split that the stage needs is missing.
            DataError: a split is unusable, or splits don't match.
        """
        for missing in missing_splits(self.settings, stage or ""):
            raise ConfigError(missing)
        hashes: dict[str, Hashes] = {}
        for split in SPLITS:
            if not self.settings.has(split) or getattr(self, split) is not None:
                continue
            dataset = self.settings.open(split)
            loaded = {name: other.dim for name in SPLITS if (other := getattr(self, name)) is not None}
            for misfit in misfits(split, len(dataset), dataset.dim, dataset.where, loaded):
                raise DataError(misfit)
            setattr(self, split, dataset)
            self.fingerprint[split] = dataset.fingerprint
            pairs = f"{len(dataset):,} pairs of dimension {dataset.dim}"
            _info("data.%s: %s: %s, %s", split, dataset.where, pairs, dataset.description)
            if dataset.hashes is not None:
                hashes[split], dataset.hashes = dataset.hashes, None
        for warning in duplicate_warnings(hashes):
            _warn(warning)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of `batch_size` rows per process; a resumed run gets the same batches."""
        dataset = self._dataset("train")
        trainer = self.trainer
        num_processes, process = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        sampler = epoch_sampler(dataset, self.settings.seed, self.settings.batch_size, num_processes, process)
        loader = ResumableLoader(
            dataset,
            batch_size=self.settings.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.settings.batch_size,
            **self._loader_options(),
        )
        if trainer is not None:
            loop = trainer.fit_loop.epoch_loop
            loader.batches_done = lambda: loop.batch_progress.current.ready if trainer.training else 0
        return loader

    def val_dataloader(self) -> DataLoader:
        """All validation rows in order."""
        return self._ordered("val")

    def test_dataloader(self) -> DataLoader:
        """All test rows in order."""
        return self._ordered("test")

    predict_dataloader = test_dataloader

    def on_exception(self, exception: BaseException) -> None:
        """Add a remedy to PyTorch's errors about workers; PyTorch doesn't know the config keys."""
        workers = f"data.num_workers = {self.settings.num_workers}"
        if "DataLoader timed out" in str(exception):
            exception.add_note(
                f"data.timeout = {self.settings.timeout:g}: no batch arrived within these seconds. Raise it if reading "
                f"is slow. {workers}: set it to 0 and press Ctrl-C twice to see where reading hangs"
            )
            _kill_workers()
        elif "DataLoader worker (pid" in str(exception) or isinstance(exception, ConnectionError | EOFError):
            exception.add_note(
                f"{workers}: a worker was killed from outside, as a system does when memory runs out. Lower the number"
            )

    def _ordered(self, split: str) -> DataLoader:
        return DataLoader(self._dataset(split), batch_size=self.settings.eval_batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.settings.num_workers,
            "persistent_workers": self.settings.num_workers > 0,
            "timeout": self.settings.timeout if self.settings.num_workers > 0 else 0,
            "collate_fn": _unchanged,
            "pin_memory": torch.cuda.is_available(),
            # An own generator: otherwise every pass over a loader would advance torch's global one.
            "generator": torch.Generator().manual_seed(self.settings.seed),
        }

    def _dataset(self, split: str) -> Samples:
        loaded = self.splits()
        if split not in loaded:
            raise ConfigError(f"data.{split} = null: there is nothing to load; give data.{split}=PATH")
        return loaded[split]


def _kill_workers() -> None:
    """Kill all workers: a hanging one may ignore SIGTERM, and Python would wait for it at exit."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may change signal handlers
    # PyTorch's handler would raise while the workers end.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if psutil.Process(process.pid).name() == _WORKER:
            process.kill()
            process.join(timeout=1)
    signal.signal(signal.SIGCHLD, handler)


def _unchanged(batch: Batch) -> Batch:
    return batch
