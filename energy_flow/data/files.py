"""Settings of data in files: the embedded reverse dictionary, or the user's own files."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from energy_flow.data.pairs import PairDataset, find_files, pair_columns
from energy_flow.data.settings import SPLITS, DataSettings
from energy_flow.data.storage.columns import Column
from energy_flow.data.storage.names import read_names
from energy_flow.errors import DataError

EMBEDDED = Path(__file__).parent / "reverse_dictionary"

NpyPair = Annotated[list[str], Field(min_length=2, max_length=2)]


class FileSettings(DataSettings):
    """Pairs from files. A split is one file, two .npy [source, target], or null: no split, or the embedded file."""

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
                f"data.{given[0]} = {getattr(self, given[0])!r}: data=reverse_dictionary has its own files; "
                "set data=files to use yours"
            )
        return self

    def has(self, split: str) -> bool:
        return bool(self._files(split))

    def open(self, split: str) -> PairDataset:
        dataset = PairDataset(self._files(split), self.normalize, f"data.{split}")
        self._check_dimension(split, dataset.dim, dataset.where)
        return dataset

    def columns(self, split: str) -> tuple[Column, Column]:
        files = self._files(split)
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

    def _files(self, split: str) -> tuple[Path, ...]:
        """Absolute paths of the file or files of a split; empty if there is no such split."""
        path = EMBEDDED / f"{split}.safetensors" if self.name == "reverse_dictionary" else getattr(self, split)
        return () if path is None else find_files(path)
