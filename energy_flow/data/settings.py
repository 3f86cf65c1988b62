"""Config group `data`: what all kinds of data have in common, and what a kind has to tell."""

from abc import abstractmethod

from pydantic import Field

from energy_flow.data.samples import Samples
from energy_flow.data.storage.columns import Column
from energy_flow.settings import Settings

SPLITS = ("train", "val", "test")


class DataSettings(Settings):
    """What every kind of data has; `seed` is that of the shuffling."""

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
        """The data set of a split that there is, checked.

        Raises:
            DataError: it can't be used.
        """

    @abstractmethod
    def columns(self, split: str) -> tuple[Column, Column]:
        """Source and target of a split that there is, opened and not yet read.

        Raises:
            DataError: they can't be used, whatever their numbers are.
        """
