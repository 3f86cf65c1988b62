"""Pairs of embeddings from a file: whole batches in one indexed read.

B rows of a batch, N rows of the file, D embedding dimension.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from energy_flow.data.columns import Column
from energy_flow.data.files import SIDES, StoredArray, read_npy, read_sides
from energy_flow.data.names import read_names
from energy_flow.data.samples import Batch, Samples
from energy_flow.errors import DataError

PathLike = str | Path


class PairDataset(Samples):
    """Rows (source, target) of a file, memory-mapped where the format allows it.

    Opening it reads the file once, in chunks, and refuses what can't be trained on. It can be sent to worker processes,
    which map the file anew.

    Args:
        path: a .safetensors or .npz with `source` and `target` [N, D] (float16/32/64, bfloat16 in .safetensors, or int8
            with `source_scale` and `target_scale` [N]), or two .npy of floats. Relative to the current folder; `~` is
            the home folder.
        normalize: L2-normalise every row.
        key: the config key that named the file, for messages.

    Attributes:
        files: where the rows come from, absolute.
        fingerprint: sha256 (hex) of what is stored, whatever the file format.
        names: what the .jsonl of the same stem calls the rows, or None. Beside a pair of .npy, the target's file first.

    Raises:
        DataError: names the key, the file, what is wrong and what to do.
    """

    def __init__(self, path: PathLike | Sequence[PathLike], normalize: bool, key: str = "data.train") -> None:
        paths = [path] if isinstance(path, str | Path) else list(path)
        self.files = tuple(Path(entry).expanduser().absolute() for entry in paths)
        self.normalize = normalize
        try:
            arrays = self._find()
            self._source = Column(arrays["source"], arrays.get("source_scale"), normalize)
            self._target = Column(arrays["target"], arrays.get("target_scale"), normalize)
            self._check_alike()
            self.names = read_names(self.files[::-1], len(self))
            self.fingerprint = hashlib.sha256(self._source.check() + self._target.check()).hexdigest()
        except DataError as error:
            raise DataError(f"{key}: {error}") from error

    @property
    def dim(self) -> int:
        """D."""
        return self._source.dim

    @property
    def where(self) -> str:
        return ", ".join(map(str, self.files))

    @property
    def description(self) -> str:
        normalised = "L2-normalised" if self.normalize else "not normalised"
        return f"stored as {self.storage}, {normalised}, {'named' if self.names else 'without names'}"

    @property
    def storage(self) -> str:
        """How the numbers are stored, for people: "int8 with row scales", "float32"."""
        kinds = dict.fromkeys(
            f"{column.values.kind}{' with row scales' if column.scale else ''}"
            for column in (self._source, self._target)
        )
        return " and ".join(kinds)

    def __len__(self) -> int:
        return self._source.num_rows

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A batch in one read per side: source and target float32 [B, D], row int64 [B]; rows in 0 <= row < N."""
        index = np.asarray(rows, dtype=np.int64)
        return {
            "source": torch.from_numpy(self._source.read(index)),
            "target": torch.from_numpy(self._target.read(index)),
            "row": torch.from_numpy(index),
        }

    def all(self) -> tuple[Tensor, Tensor]:
        """All rows at once: source and target, float32 [N, D]."""
        return torch.from_numpy(self._source.all()), torch.from_numpy(self._target.all())

    def _find(self) -> dict[str, StoredArray]:
        if len(self.files) == 1:
            return read_sides(self.files[0])
        if len(self.files) != 2:
            raise DataError(f"{len(self.files)} files given; give one file or two .npy: [source.npy,target.npy]")
        return {name: read_npy(path, name) for name, path in zip(SIDES, self.files, strict=True)}

    def _check_alike(self) -> None:
        source, target = self._source, self._target
        if source.num_rows != target.num_rows:
            raise DataError(
                f"{target.values.file}: target has {target.num_rows:,} rows, source {source.num_rows:,}; "
                "row i of both must be a pair; write as many targets as sources"
            )
        if source.dim != target.dim:
            raise DataError(
                f"{target.values.file}: target has dimension {target.dim}, source {source.dim}; both must be the same; "
                "encode both with the same model"
            )
