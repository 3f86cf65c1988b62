"""One side of a file: sources for predictions, or targets for a gallery.

N rows, D embedding dimension
"""

from pathlib import Path

import torch
from torch import Tensor

from energy_flow.data.storage.arrays import read_arrays
from energy_flow.data.storage.columns import Column
from energy_flow.data.storage.names import read_names
from energy_flow.errors import DataError


class Rows:
    """`source` or `target` [N, D] of a file. The constructor reads it once and refuses unusable data.

    Args:
        path: a .safetensors or .npz with an array of that name, or a .npy. For dtypes see `PairDataset`.
        side: "source" or "target".
        normalize: L2-normalise every row.
        key: config key of the file, for messages.

    Attributes:
        file: absolute path.
        names: of the rows, from a .jsonl with the same stem; None without such a file.

    Raises:
        DataError: the data are unusable; the message names key, file, fault and remedy.
    """

    def __init__(self, path: str | Path, side: str, normalize: bool, key: str) -> None:
        self.file = Path(path).expanduser().absolute()
        try:
            arrays = read_arrays((self.file,), (side,))
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
