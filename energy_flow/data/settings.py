"""Config group `data`: settings and operations that all kinds of data share.

D embedding dimension
"""

from abc import abstractmethod
from collections.abc import Mapping

from pydantic import Field

from energy_flow.data.samples import Samples
from energy_flow.data.storage.columns import Column
from energy_flow.settings import Settings

SPLITS = ("train", "val", "test")

# Stage of Lightning -> the splits that it needs.
_NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class DataSettings(Settings):
    """Settings of every kind of data; `seed` is for shuffling."""

    normalize: bool
    batch_size: int = Field(ge=1)
    eval_batch_size: int = Field(ge=1)
    num_workers: int = Field(ge=0)
    timeout: float = Field(gt=0, allow_inf_nan=False)
    seed: int = Field(ge=0)

    @abstractmethod
    def has(self, split: str) -> bool:
        """Whether there is such a split."""

    @abstractmethod
    def open(self, split: str) -> Samples:
        """Open and check the data set of an existing split.

        Raises:
            DataError: the data are unusable.
        """

    @abstractmethod
    def columns(self, split: str) -> tuple[Column, Column]:
        """Open source and target of an existing split without reading their numbers.

        Raises:
            DataError: files, shapes or dtypes are unusable.
        """


def missing_splits(settings: DataSettings, stage: str) -> list[str]:
    """List the splits that a stage of Lightning (`fit`, `test`, ...) needs and the data lack, one message each."""
    return [
        f"data.{split} = null: {stage} needs it; give data.{split}=PATH"
        for split in _NEEDED.get(stage, ())
        if not settings.has(split)
    ]


def misfits(split: str, num_rows: int, dim: int, where: str, others: Mapping[str, int]) -> list[str]:
    """List the reasons why a split can't be used together with `others` (D by split), one message each."""
    found = [
        f"data.{split}: {where}: dimension {dim}, but data.{other} has {other_dim}; all splits must have the same"
        for other, other_dim in others.items()
        if other_dim != dim
    ]
    return found + [f"data.{split}: {where}: 1 row; retrieval needs at least 2 candidates"] * (num_rows < 2)
