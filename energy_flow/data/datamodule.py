"""The data of a run: settings, the three splits, loaders."""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import psutil
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field, model_validator
from torch.utils.data import DataLoader

from energy_flow.data.pairs import PairDataset, find_files, pair_columns
from energy_flow.data.samples import Batch, Samples
from energy_flow.data.sampling import ResumableLoader, epoch_sampler
from energy_flow.data.settings import SPLITS, DataSettings
from energy_flow.data.storage.columns import Column
from energy_flow.data.storage.duplicates import PairHashes, copy_warnings
from energy_flow.data.storage.names import read_names
from energy_flow.data.transport import TransportSettings
from energy_flow.errors import ConfigError, DataError
from energy_flow.settings import read

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "reverse_dictionary"

# What Lightning is about to do -> the splits it can't do without.
_NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}

NpyPair = Annotated[list[str], Field(min_length=2, max_length=2)]


class FileSettings(DataSettings):
    """Pairs from files. A split is a file or two .npy [source, target]; null: none, or the embedded file."""

    name: Literal["reverse_dictionary", "files"]
    train: str | NpyPair | None
    val: str | NpyPair | None
    test: str | NpyPair | None
    dimension: Annotated[int, Field(ge=1)] | None

    @model_validator(mode="after")
    def _check_splits(self) -> Self:
        given = [split for split in SPLITS if getattr(self, split) is not None]
        if self.name == "files" and not given:
            raise ValueError(
                "data.train = null: data=files needs files; give data.train=PATH data.val=PATH to train, "
                "data.test=PATH to evaluate"
            )
        if self.name == "reverse_dictionary" and given:
            raise ValueError(
                f"data.{given[0]} = {getattr(self, given[0])!r}: data=reverse_dictionary brings its own files; "
                "choose data=files for yours"
            )
        return self

    def has(self, split: str) -> bool:
        return self._path(split) is not None

    def open(self, split: str) -> PairDataset:
        path = self._path(split)
        assert path is not None
        dataset = PairDataset(path, self.normalize, f"data.{split}")
        self._check_dimension(split, dataset.dim, dataset.where)
        return dataset

    def columns(self, split: str) -> tuple[Column, Column]:
        path = self._path(split)
        assert path is not None
        files = find_files(path)
        try:
            source, target = pair_columns(files, self.normalize)
            read_names(files[::-1], source.num_rows)
        except DataError as error:
            raise DataError(f"data.{split}: {error}") from error
        self._check_dimension(split, source.dim, ", ".join(map(str, files)))
        return source, target

    def _check_dimension(self, split: str, dim: int, where: str) -> None:
        if self.dimension not in (None, dim):
            raise DataError(
                f"data.{split}: {where}: dimension {dim}, but data.dimension = {self.dimension}; "
                f"set data.dimension={dim} or give other files"
            )

    def _path(self, split: str) -> str | list[str] | None:
        """The file or files of a split, None where there is none."""
        if self.name == "reverse_dictionary":
            return str(EMBEDDED / f"{split}.safetensors")
        return getattr(self, split)


_WORKER = "pt_data_worker"  # as PyTorch names its processes

# `data.name` -> the class that reads the section.
KINDS: dict[str, type[DataSettings]] = {
    "reverse_dictionary": FileSettings,
    "files": FileSettings,
    "transport": TransportSettings,
}


def read_data_settings(section: Any) -> DataSettings:
    """The settings of a config section `data`, of the class that its `name` asks for.

    Raises:
        ConfigError: no such name, an unknown key, or a value that can't work.
    """
    name = section.get("name") if isinstance(section, Mapping) else "files"
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"data.name = {name!r}: must be one of {', '.join(KINDS)}")
    return read(KINDS[name], section, "data")


class EnergyDataModule(LightningDataModule):
    """Pairs of embeddings for training, validation and test.

    Everything is checked in `setup`, before any training. Batches are dicts: source and target float32 [B, D], row
    int64 [B]. Training rows are shuffled by (seed, epoch); the last incomplete training batch is left out unless it is
    the only one, because in-batch negatives of a few rows are mostly noise.

    Attributes:
        train, val, test: the data sets after `setup`; None where there is none.
        fingerprint: sha256 (hex) of every split, after `setup`.
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
        """The data of a config, such as `energy_flow.config.compose()` gives."""
        return cls(read_data_settings(config["data"]))

    @property
    def dim(self) -> int:
        """D, the embedding dimension of all splits; after `setup`."""
        return next(iter(self.splits().values())).dim

    def splits(self) -> dict[str, Samples]:
        """The data sets that there are, by split; after `setup`."""
        loaded = {split: dataset for split in SPLITS if (dataset := getattr(self, split)) is not None}
        if not loaded:
            raise RuntimeError("no data yet: call setup() first")
        return loaded

    def setup(self, stage: str | None = None) -> None:
        """Opens and checks every split that there is.

        Raises:
            ConfigError: a split that the stage needs isn't there.
            DataError: a split that can't be used, or splits that don't belong together.
        """
        for missing in missing_splits(self.settings, stage or ""):
            raise ConfigError(missing)
        hashes: dict[str, PairHashes] = {}
        for split in SPLITS:
            if not self.settings.has(split) or getattr(self, split) is not None:
                continue
            dataset = self.settings.open(split)
            loaded = {name: other.dim for name in SPLITS if (other := getattr(self, name)) is not None}
            for misfit in misfits(split, len(dataset), dataset.dim, dataset.where, loaded):
                raise DataError(misfit)
            setattr(self, split, dataset)
            self.fingerprint[split] = dataset.fingerprint
            _log_split(split, dataset)
            if (found := dataset.take_hashes()) is not None:
                hashes[split] = found
        for warning in copy_warnings(hashes):
            _warn(warning)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of `batch_size` rows per process, the same in a resumed run."""
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

    def predict_dataloader(self) -> DataLoader:
        """The test rows again."""
        return self._ordered("test")

    def on_exception(self, exception: BaseException) -> None:
        """Say what to do where workers failed: PyTorch says what happened, and knows no config."""
        workers = f"data.num_workers = {self.settings.num_workers}"
        if "DataLoader timed out" in str(exception):
            exception.add_note(
                f"data.timeout = {self.settings.timeout:g}: no batch came in this time. If reading takes that long, "
                f"raise it; {workers}: with 0 nothing waits, and Ctrl-C twice shows where reading hangs"
            )
            _kill_workers()
        elif "DataLoader worker (pid" in str(exception) or isinstance(exception, ConnectionError | EOFError):
            exception.add_note(
                f"{workers}: one of them was ended from outside, as a system does that has no memory left. Set fewer"
            )

    def _ordered(self, split: str) -> DataLoader:
        return DataLoader(self._dataset(split), batch_size=self.settings.eval_batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.settings.num_workers,
            "persistent_workers": self.settings.num_workers > 0,
            "timeout": self.settings.timeout if self.settings.num_workers > 0 else 0,
            "collate_fn": _as_it_is,
            "pin_memory": torch.cuda.is_available(),
            # Its own: otherwise every pass over a loader would move torch's global stream.
            "generator": torch.Generator().manual_seed(self.settings.seed),
        }

    def _dataset(self, split: str) -> Samples:
        loaded = self.splits()
        if split not in loaded:
            raise ConfigError(f"data.{split} = null: nothing to load; give data.{split}=PATH")
        return loaded[split]


def missing_splits(settings: DataSettings, stage: str) -> list[str]:
    """What Lightning is about to do (`fit`, `test`, ...) and the data have no split for, a line each."""
    return [
        f"data.{split} = null: {stage} needs it; give data.{split}=PATH"
        for split in _NEEDED.get(stage, ())
        if not settings.has(split)
    ]


def misfits(split: str, num_rows: int, dim: int, where: str, others: Mapping[str, int]) -> list[str]:
    """Why a split can't be used beside `others` (name -> dimension), a line each."""
    found = [
        f"data.{split}: {where}: dimension {dim}, but data.{other} has {other_dim}; all splits must have the same"
        for other, other_dim in others.items()
        if other_dim != dim
    ]
    return found + [f"data.{split}: {where}: 1 row; retrieval needs at least 2 candidates"] * (num_rows < 2)


def _kill_workers() -> None:
    """One that hangs may not end when it is asked to, and Python would wait for it."""
    if threading.current_thread() is not threading.main_thread():
        return  # signal handlers are the main thread's
    raises = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's, in the middle of what comes next
    for process in multiprocessing.active_children():
        if psutil.Process(process.pid).name() == _WORKER:
            process.kill()
            process.join(timeout=1)
    signal.signal(signal.SIGCHLD, raises)


def _as_it_is(batch: Batch) -> Batch:
    return batch


@rank_zero_only
def _log_split(split: str, dataset: Samples) -> None:
    pairs = f"{len(dataset):,} pairs of dimension {dataset.dim}"
    log.info("data.%s: %s: %s, %s", split, dataset.where, pairs, dataset.description)


@rank_zero_only
def _warn(what: str) -> None:
    log.warning(what)
