"""One side of a file: the sources to predict from, or the targets to choose from.

N rows, D embedding dimension.
"""

from pathlib import Path

import torch
from torch import Tensor

from energy_flow.data.storage.arrays import read_npy, read_sides
from energy_flow.data.storage.columns import Column
from energy_flow.data.storage.names import read_names
from energy_flow.errors import DataError


class Rows:
    """`source` or `target` [N, D] of a file; opening it reads it once and refuses what can't be used.

    Args:
        path: a .safetensors or .npz that holds the array under its name, or a .npy. Numbers as in `PairDataset`.
        side: "source" or "target".
        normalize: L2-normalise every row.
        key: the config key that named the file, for messages.

    Attributes:
        file: absolute.
        names: what the .jsonl of the same stem calls the rows, or None.

    Raises:
        DataError: names the key, the file, what is wrong and what to do.
    """

    def __init__(self, path: str | Path, side: str, normalize: bool, key: str) -> None:
        self.file = Path(path).expanduser().absolute()
        try:
            if self.file.suffix not in (".safetensors", ".npz", ".npy"):
                raise DataError(
                    f"{self.file}: unknown suffix {self.file.suffix!r}; give a .safetensors or .npz with {side}, "
                    "or a .npy"
                )
            npy = self.file.suffix == ".npy"
            arrays = {side: read_npy(self.file, side)} if npy else read_sides(self.file, (side,))
            self._column = Column(arrays[side], arrays.get(f"{side}_scale"), normalize)
            self._column.check()
            self.names = read_names((self.file,), len(self))
        except DataError as error:
            raise DataError(f"{key}: {error}") from error

    @property
    def dim(self) -> int:
        """D."""
        return self._column.dim

    def __len__(self) -> int:
        return self._column.num_rows

    def all(self) -> Tensor:
        """All rows, float32 [N, D]."""
        return torch.from_numpy(self._column.all())
