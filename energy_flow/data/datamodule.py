"""The data of a run: settings, files of the three splits, loaders."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field, model_validator
from torch.utils.data import DataLoader

from energy_flow.data.pairs import Batch, PairDataset
from energy_flow.data.sampling import ResumableLoader, epoch_sampler
from energy_flow.errors import ConfigError, DataError
from energy_flow.settings import Settings, read

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "reverse_dictionary"
SPLITS = ("train", "val", "test")

# What Lightning is about to do -> the splits it can't do without.
_NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}

NpyPair = Annotated[list[str], Field(min_length=2, max_length=2)]


class DataSettings(Settings):
    """Config group `data`. A split is a file or two .npy [source, target]; null: none, or the embedded file."""

    name: Literal["reverse_dictionary", "files"]
    train: str | NpyPair | None
    val: str | NpyPair | None
    test: str | NpyPair | None
    normalize: bool
    dimension: Annotated[int, Field(ge=1)] | None
    batch_size: int = Field(ge=1)
    eval_batch_size: int = Field(ge=1)
    num_workers: int = Field(ge=0)
    seed: int = Field(ge=0)

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

    def path(self, split: str) -> str | list[str] | None:
        """The file or files of a split, None where there is none."""
        if self.name == "reverse_dictionary":
            return str(EMBEDDED / f"{split}.safetensors")
        return getattr(self, split)


class EnergyDataModule(LightningDataModule):
    """Pairs of embeddings for training, validation and test.

    Everything is checked in `setup`, before any training. Batches are dicts: source and target float32 [B, D], row
    int64 [B]. Training rows are shuffled by (seed, epoch); the last incomplete training batch is left out unless it is
    the only one, because in-batch negatives of a few rows are mostly noise.

    Attributes:
        train, val, test: the data sets after `setup`; None where no file is given.
        fingerprint: sha256 (hex) of every split, after `setup`.
    """

    def __init__(self, settings: DataSettings) -> None:
        super().__init__()
        self.settings = settings
        self.train: PairDataset | None = None
        self.val: PairDataset | None = None
        self.test: PairDataset | None = None
        self.fingerprint: dict[str, str] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The data of a config, such as `energy_flow.config.compose()` gives."""
        return cls(read(DataSettings, config["data"], "data"))

    @property
    def dim(self) -> int:
        """D, the embedding dimension of all splits; after `setup`."""
        return next(iter(self.splits().values())).dim

    def splits(self) -> dict[str, PairDataset]:
        """The data sets that there are, by split; after `setup`."""
        loaded = {split: dataset for split in SPLITS if (dataset := getattr(self, split)) is not None}
        if not loaded:
            raise RuntimeError("no data yet: call setup() first")
        return loaded

    def setup(self, stage: str | None = None) -> None:
        """Opens and checks every split that has a file.

        Raises:
            ConfigError: a split that the stage needs has no file.
            DataError: a file that can't be used, or splits that don't belong together.
        """
        for split in _NEEDED.get(stage or "", ()):
            if self.settings.path(split) is None:
                raise ConfigError(f"data.{split} = null: {stage} needs it; give data.{split}=PATH")
        for split in SPLITS:
            path = self.settings.path(split)
            if path is None or getattr(self, split) is not None:
                continue
            dataset = PairDataset(path, self.settings.normalize, f"data.{split}")
            self._check_dimension(split, dataset)
            if len(dataset) < 2:
                raise DataError(f"data.{split}: {dataset.files[0]}: 1 row; retrieval needs at least 2 candidates")
            setattr(self, split, dataset)
            self.fingerprint[split] = dataset.fingerprint
            _log_split(split, dataset)

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

    def _ordered(self, split: str) -> DataLoader:
        return DataLoader(self._dataset(split), batch_size=self.settings.eval_batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.settings.num_workers,
            "persistent_workers": self.settings.num_workers > 0,
            "collate_fn": _as_it_is,
            "pin_memory": torch.cuda.is_available(),
            # Its own: otherwise every pass over a loader would move torch's global stream.
            "generator": torch.Generator().manual_seed(self.settings.seed),
        }

    def _dataset(self, split: str) -> PairDataset:
        loaded = self.splits()
        if split not in loaded:
            raise ConfigError(f"data.{split} = null: nothing to load; give data.{split}=PATH")
        return loaded[split]

    def _check_dimension(self, split: str, dataset: PairDataset) -> None:
        where = f"data.{split}: {dataset.files[0]}: dimension {dataset.dim}"
        if self.settings.dimension not in (None, dataset.dim):
            raise DataError(
                f"{where}, but data.dimension = {self.settings.dimension}; set data.dimension={dataset.dim} or give "
                "other files"
            )
        for other in SPLITS[: SPLITS.index(split)]:
            known = getattr(self, other)
            if known is not None and known.dim != dataset.dim:
                raise DataError(f"{where}, but data.{other} has {known.dim}; all splits must have the same")


def _as_it_is(batch: Batch) -> Batch:
    return batch


@rank_zero_only
def _log_split(split: str, dataset: PairDataset) -> None:
    log.info(
        "data.%s: %s: %s pairs of dimension %d, stored as %s, %s, %s",
        split,
        ", ".join(map(str, dataset.files)),
        f"{len(dataset):,}",
        dataset.dim,
        dataset.storage,
        "L2-normalised" if dataset.normalize else "not normalised",
        "named" if dataset.names else "without names",
    )
