"""Pairs of embeddings from files; a batch is one indexed read.

B rows of a batch, N rows of the file, D embedding dimension
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from energy_flow.data.samples import Batch, Samples
from energy_flow.data.storage.arrays import SIDES, read_arrays
from energy_flow.data.storage.columns import Column, Survey
from energy_flow.data.storage.duplicates import pair_hashes
from energy_flow.data.storage.names import read_names
from energy_flow.errors import DataError

PathLike = str | Path


class PairDataset(Samples):
    """Rows (source, target) of a file, memory-mapped if the format allows it.

    The constructor reads the file once, in chunks, and refuses unusable data. Worker processes that receive the data
    set map the file again.

    Args:
        path: a .safetensors or .npz with `source` and `target` [N, D] (float16/32/64, bfloat16 in .safetensors, or int8
            with `source_scale` and `target_scale` [N]), or two .npy of floats. Paths are relative to the current
            folder; `~` is the home folder.
        normalize: L2-normalise every row.
        key: config key of the file, for messages.

    Attributes:
        files: absolute paths.
        fingerprint: sha256 (hex) of the stored numbers; it does not depend on the file format.
        names: of the rows, from a .jsonl with the same stem; None without such a file. For two .npy, the target's stem
            has precedence.

    Raises:
        DataError: the data are unusable; the message names key, file, fault and remedy.
    """

    def __init__(self, path: PathLike | Sequence[PathLike], normalize: bool, key: str = "data.train") -> None:
        self.files = find_files(path)
        self.normalize = normalize
        try:
            self._source, self._target = pair_columns(self.files, normalize)
            self.names = read_names(self.files[::-1], len(self))
            surveys = self._source.check(), self._target.check()
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        self.fingerprint = fingerprint(*surveys)
        self.hashes = pair_hashes(*surveys)

    @property
    def dim(self) -> int:
        return self._source.dim

    @property
    def where(self) -> str:
        return ", ".join(map(str, self.files))

    @property
    def description(self) -> str:
        normalised = "L2-normalised" if self.normalize else "not normalised"
        columns = (self._source, self._target)
        kinds = dict.fromkeys(
            f"{column.values.kind} with row scales" if column.scale else column.values.kind for column in columns
        )
        return f"stored as {' and '.join(kinds)}, {normalised}, {'named' if self.names else 'without names'}"

    def __len__(self) -> int:
        return self._source.num_rows

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        index = np.asarray(rows, dtype=np.int64)
        return {
            "source": torch.from_numpy(self._source.read(index)),
            "target": torch.from_numpy(self._target.read(index)),
            "row": torch.from_numpy(index),
        }

    def all(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._source.all()), torch.from_numpy(self._target.all())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hashes": None}  # workers don't need them


def find_files(path: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    """Absolute paths of the file or files of a split; `~` is the home folder."""
    paths = [path] if isinstance(path, str | Path) else list(path)
    return tuple(Path(entry).expanduser().absolute() for entry in paths)


def pair_columns(files: Sequence[Path], normalize: bool) -> tuple[Column, Column]:
    """Open source and target of one file or two .npy, without reading the numbers.

    Raises:
        DataError: an array is missing, or the shapes don't match.
    """
    arrays = read_arrays(files)
    source, target = (Column(arrays[side], arrays.get(f"{side}_scale"), normalize) for side in SIDES)
    if source.num_rows != target.num_rows:
        raise DataError(
            f"{target.values.file}: target has {target.num_rows:,} rows, source {source.num_rows:,}; "
            "row i of both must be a pair; write equal numbers of rows"
        )
    if source.dim != target.dim:
        raise DataError(
            f"{target.values.file}: target has dimension {target.dim}, source {source.dim}; both must be the same; "
            "encode both with the same model"
        )
    return source, target


def read_rows(path: PathLike, side: str, normalize: bool, key: str) -> tuple[Tensor, list[str] | None]:
    """Read one side of a file: sources for predictions, or targets for a gallery.

    Args:
        path: a .safetensors or .npz with an array of that name, or a .npy. For dtypes see `PairDataset`.
        side: "source" or "target".
        normalize: L2-normalise every row.
        key: config key of the file, for messages.

    Returns:
        All rows, float32 [N, D], and their names from a .jsonl with the same stem; None without such a file.

    Raises:
        DataError: the data are unusable; the message names key, file, fault and remedy.
    """
    files = find_files(path)
    try:
        arrays = read_arrays(files, (side,))
        column = Column(arrays[side], arrays.get(f"{side}_scale"), normalize)
        column.check()
        return torch.from_numpy(column.all()), read_names(files, column.num_rows)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def fingerprint(source: Survey, target: Survey) -> str:
    """sha256 (hex) of the stored numbers; it does not depend on the file format."""
    return hashlib.sha256(source.digest + target.digest).hexdigest()
