"""What a data set of pairs offers, wherever its rows come from.

B rows of a batch, N rows of the data set, D embedding dimension.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from energy_flow.data.storage.duplicates import PairHashes

Batch = dict[str, Tensor]


class Samples(Dataset):
    """Rows (source, target) of one split.

    Attributes:
        fingerprint: sha256 (hex) of what decides the rows.
        files: where they are stored, absolute; empty where they are made.
        names: what the rows are called, or None.
    """

    fingerprint: str
    files: tuple[Path, ...] = ()
    names: list[str] | None = None

    @property
    @abstractmethod
    def dim(self) -> int:
        """D."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Where the rows come from, for messages."""

    @property
    @abstractmethod
    def description(self) -> str:
        """How they are stored or made, for the log."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A batch: source and target float32 [B, D], row int64 [B]; rows in 0 <= row < N."""

    @abstractmethod
    def all(self) -> tuple[Tensor, Tensor]:
        """All rows at once: source and target, float32 [N, D]."""

    def take_hashes(self) -> PairHashes | None:
        """What tells copies of rows, once; None where rows are made, not stored."""
        return None

    def __getitem__(self, row: int) -> Batch:
        """One pair: source and target float32 [D], row int64 []."""
        return {name: values[0] for name, values in self.__getitems__([range(len(self))[row]]).items()}
