"""Interface of a data set of pairs.

B rows of a batch, N rows of the data set, D embedding dimension
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from energy_flow.data.storage.duplicates import Hashes

Batch = dict[str, Tensor]


class Samples(Dataset):
    """Rows (source, target) of one split.

    Attributes:
        fingerprint: sha256 (hex) of the stored rows, or of the settings that generate them.
        files: absolute paths; empty for generated rows.
        names: of the rows; None: the rows have no names.
        hashes: for finding duplicate rows; None for generated rows, or if they are no longer needed.
    """

    fingerprint: str
    files: tuple[Path, ...] = ()
    names: list[str] | None = None
    hashes: Hashes | None = None

    @property
    @abstractmethod
    def dim(self) -> int:
        """D."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Source of the rows, for messages."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Storage or generation of the rows, for the log."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A batch: source and target float32 [B, D], row int64 [B], for 0 <= row < N."""

    @abstractmethod
    def all(self) -> tuple[Tensor, Tensor]:
        """All rows: source and target, float32 [N, D]."""

    def __getitem__(self, row: int) -> Batch:
        """One pair: source and target float32 [D], row int64 []."""
        return {name: values[0] for name, values in self.__getitems__([range(len(self))[row]]).items()}
