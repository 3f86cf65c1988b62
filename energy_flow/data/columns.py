"""One side of the pairs: stored numbers, decoded to float32 rows and, if asked for, L2-normalised.

N rows, D embedding dimension.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energy_flow.data.files import StoredArray
from energy_flow.errors import DataError

_CHUNK_BYTES = 1 << 25


class Column:
    """`source` or `target` of a file: [N, D] numbers, int8 ones with a scale [N] per row.

    The numbers stay in the file; a process maps it when it first reads, so a column can be sent to other processes.

    Raises:
        DataError: the shapes can't be [N, D] and [N], or scales and dtype don't belong together.
    """

    def __init__(self, values: StoredArray, scale: StoredArray | None, normalize: bool) -> None:
        self.values = values
        self.scale = scale
        self.normalize = normalize
        self._arrays: tuple[NDArray, NDArray | None] | None = None
        self._check_shape()
        self._check_scale()

    @property
    def num_rows(self) -> int:
        """N."""
        return self.values.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.values.shape[1]

    def arrays(self) -> tuple[NDArray, NDArray | None]:
        """The numbers [N, D] as they are stored and their scales [N]; memory-mapped wherever the format allows it."""
        if self._arrays is None:
            self._arrays = self.values.open(), None if self.scale is None else self.scale.open()
        return self._arrays

    def read(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Rows as they are trained on, [len(index), D]: scaled and, with `normalize`, of length 1."""
        rows = self._decode(index)
        if not self.normalize:
            return rows
        # In float64, whose squares neither overflow nor vanish for any float32 value.
        exact = rows.astype(np.float64)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        return exact.astype(np.float32)

    def all(self) -> NDArray[np.float32]:
        """All rows at once, [N, D]; read in chunks."""
        rows = np.empty((self.num_rows, self.dim), np.float32)
        for chunk in self.chunks():
            rows[chunk] = self.read(chunk)
        return rows

    def chunks(self) -> Iterator[slice]:
        """All rows in slices of bounded size, in order."""
        size = max(1, _CHUNK_BYTES // (8 * self.dim))
        return (slice(start, min(start + size, self.num_rows)) for start in range(0, self.num_rows, size))

    def check(self) -> bytes:
        """Reads everything once, in chunks: every number must be finite and, with `normalize`, no row zero.

        Returns:
            The sha256 digest of what is stored: names, dtypes, shapes and numbers, in row order; the same for the same
            numbers in another file format.

        Raises:
            DataError: names the file, the array, the first bad row and how many there are.
        """
        digest = hashlib.sha256()
        values, scale = self.arrays()
        if self.scale is not None and scale is not None:
            _add_header(digest, self.scale)
            _add_numbers(digest, scale)
            self._refuse(
                self.scale, np.flatnonzero(~(np.isfinite(scale) & (scale >= 0))), "a scale below 0, NaN or Inf"
            )
        _add_header(digest, self.values)
        unfit, zero = [], []
        for rows in self.chunks():
            _add_numbers(digest, values[rows])
            decoded = self._decode(rows)
            unfit.append(np.flatnonzero(~np.isfinite(decoded).all(axis=1)) + rows.start)
            zero.append(np.flatnonzero(~decoded.any(axis=1)) + rows.start)
        self._refuse(self.values, np.concatenate(unfit), "NaN or Inf (as float32)")
        if self.normalize:
            self._refuse(self.values, np.concatenate(zero), "nothing but zeros and can't be L2-normalised")
        self._release()
        return digest.digest()

    def _decode(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        values, scale = self.arrays()
        stored = np.asarray(values[index])
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found, and named, by `check`
            if self.values.kind == "bfloat16":
                return (stored.astype(np.uint32) << 16).view(np.float32)
            rows = stored.astype(np.float32)
            if scale is not None:
                rows *= np.asarray(scale[index]).astype(np.float32)[:, None]
        return rows

    def _release(self) -> None:
        # The pass above has touched every page of the map; a fresh map starts without them in this process's memory.
        if self.values.offset is not None:
            self._arrays = None

    def _check_shape(self) -> None:
        shape, where = self.values.shape, f"{self.values.file}: {self.values.name}"
        if len(shape) != 2:
            raise DataError(f"{where} has shape {shape}; it must have 2 axes, [rows, dimension]; reshape it")
        if 0 in shape:
            raise DataError(f"{where} has shape {shape}: it is empty; it must have at least 1 row and 1 column")

    def _check_scale(self) -> None:
        values, scale = self.values, self.scale
        where = f"{values.file}: {values.name}"
        if scale is None:
            if values.kind == "int8":
                raise DataError(f"{where} is int8, but no {values.name}_scale [N] is there; add it or store floats")
            return
        if values.kind != "int8":
            raise DataError(f"{where} is {values.kind}, but {scale.name} is there; scales go with int8; remove one")
        if scale.kind not in ("float16", "float32", "float64"):
            raise DataError(f"{scale.file}: {scale.name} has dtype {scale.kind}; store it as float32")
        if scale.shape != values.shape[:1]:
            raise DataError(f"{scale.file}: {scale.name} has shape {scale.shape}; one per row is {values.shape[:1]}")

    def _refuse(self, array: StoredArray, rows: NDArray[np.int64], what: str) -> None:
        if len(rows):
            raise DataError(
                f"{array.file}: {array.name} row {rows[0]} holds {what}; {len(rows):,} of {self.num_rows:,} rows do; "
                "mend or remove them"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


def _add_header(digest: Any, array: StoredArray) -> None:
    digest.update(f"{array.name} {array.kind} {array.dtype.byteorder} {list(array.shape)}\n".encode())


def _add_numbers(digest: Any, numbers: NDArray) -> None:
    digest.update(np.ascontiguousarray(numbers).view(np.uint8))
