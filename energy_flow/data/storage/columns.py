"""One side of the pairs: stored numbers, decoded to float32 rows and optionally L2-normalised.

N rows, D embedding dimension
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energy_flow.data.storage.arrays import StoredArray
from energy_flow.errors import DataError

_CHUNK_BYTES = 1 << 25

# Called with every chunk of a pass: the rows, and their numbers as float32 [rows, D], not normalised.
OnChunk = Callable[[slice, NDArray[np.float32]], None]


@dataclass(frozen=True)
class Survey:
    """Findings of one pass over a column.

    Attributes:
        digest: sha256 of names, dtypes, shapes and stored numbers in row order; it does not depend on the file format.
        hashes: int64 [N], of the stored bytes of every row: equal rows have equal hashes. Valid in this process only.
        bad_scales: rows whose scale is below 0, NaN or Inf.
        not_finite: rows with NaN or Inf as float32.
        zero: rows of zeros only.
    """

    digest: bytes
    hashes: NDArray[np.int64]
    bad_scales: NDArray[np.int64]
    not_finite: NDArray[np.int64]
    zero: NDArray[np.int64]


class Column:
    """`source` or `target` of a file: numbers [N, D]; int8 numbers have scales [N], one per row.

    The numbers stay in the file. Each process maps the file at its first read, so columns can be sent to processes.

    Raises:
        DataError: the shapes are not [N, D] and [N], or scales don't match the dtype.
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

    @property
    def num_bytes(self) -> int:
        """Stored size of the numbers and their scales."""
        arrays = (self.values,) if self.scale is None else (self.values, self.scale)
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    def arrays(self) -> tuple[NDArray, NDArray | None]:
        """The stored numbers [N, D] and scales [N], memory-mapped if the format allows it."""
        if self._arrays is None:
            self._arrays = self.values.open(), None if self.scale is None else self.scale.open()
        return self._arrays

    def read(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Rows for training, [len(index), D]: scaled and, with `normalize`, of length 1."""
        rows = self._decode(index)
        if not self.normalize:
            return rows
        # In float64, where squares of float32 values neither overflow nor underflow.
        exact = rows.astype(np.float64)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        return exact.astype(np.float32)

    def all(self) -> NDArray[np.float32]:
        """All rows [N, D], read in chunks."""
        rows = np.empty((self.num_rows, self.dim), np.float32)
        for chunk in self.chunks():
            rows[chunk] = self.read(chunk)
        return rows

    def chunks(self) -> Iterator[slice]:
        """Slices of bounded size that cover all rows in order."""
        size = max(1, _CHUNK_BYTES // (8 * self.dim))
        return (slice(start, min(start + size, self.num_rows)) for start in range(0, self.num_rows, size))

    def check(self) -> Survey:
        """Read all rows once, in chunks; all numbers must be finite and, with `normalize`, no row may be zero.

        Raises:
            DataError: the message names file, array, the first bad row and the number of bad rows.
        """
        survey = self.survey()
        for complaint in self.complaints(survey):
            raise DataError(complaint)
        return survey

    def survey(self, on_chunk: OnChunk | None = None) -> Survey:
        """Read all rows once, in chunks, and call `on_chunk` with every chunk; bad rows are recorded, not refused."""
        digest: Any = hashlib.sha256()
        scale, bad_scales = None, np.empty(0, np.int64)
        if self.scale is not None:
            scale = np.ascontiguousarray(self.scale.open())
            _add_header(digest, self.scale)
            digest.update(scale.view(np.uint8))
            bad_scales = np.flatnonzero(~(np.isfinite(scale) & (scale >= 0)))
        _add_header(digest, self.values)
        hashes, not_finite, zero = np.empty(self.num_rows, np.int64), [], []
        for rows in self.chunks():
            stored = np.ascontiguousarray(self.arrays()[0][rows])
            digest.update(stored.view(np.uint8))
            hashes[rows] = hash_rows(stored)
            if scale is not None:
                scale_bits = scale[rows].astype(np.float64).view(np.int64)
                hashes[rows] = hash_rows(np.stack([hashes[rows], scale_bits], axis=1))
            decoded = self._decode(rows)
            not_finite.append(np.flatnonzero(~np.isfinite(decoded).all(axis=1)) + rows.start)
            zero.append(np.flatnonzero(~decoded.any(axis=1)) + rows.start)
            if on_chunk is not None:
                on_chunk(rows, decoded)
            self._release()
        return Survey(digest.digest(), hashes, bad_scales, np.concatenate(not_finite), np.concatenate(zero))

    def complaints(self, survey: Survey) -> list[str]:
        """List the findings that training refuses, one message each."""
        found = [
            (self.scale, survey.bad_scales, "a scale below 0, NaN or Inf"),
            (self.values, survey.not_finite, "NaN or Inf (as float32)"),
            (self.values if self.normalize else None, survey.zero, "only zeros, so it can't be L2-normalised"),
        ]
        return [
            f"{array.file}: {array.name} row {rows[0]} holds {fault}; {len(rows):,} of {self.num_rows:,} rows do; "
            "repair or remove them"
            for array, rows, fault in found
            if array is not None and len(rows)
        ]

    def _decode(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        values, scale = self.arrays()
        stored = np.asarray(values[index])
        with np.errstate(over="ignore", invalid="ignore"):  # `check` reports overflows
            if self.values.kind == "bfloat16":
                return (stored.astype(np.uint32) << 16).view(np.float32)
            rows = stored.astype(np.float32)
            if scale is not None:
                rows *= np.asarray(scale[index]).astype(np.float32)[:, None]
        return rows

    def _release(self) -> None:
        # A pass loads every page of the map into this process's memory; a new map starts without them.
        if self.values.offset is not None:
            self._arrays = None

    def _check_shape(self) -> None:
        shape, where = self.values.shape, f"{self.values.file}: {self.values.name}"
        if len(shape) != 2:
            raise DataError(f"{where} has shape {shape}; it must have 2 axes, [rows, dimension]; reshape it")
        if 0 in shape:
            raise DataError(f"{where} has shape {shape}: it is empty; give at least 1 row and 1 column")

    def _check_scale(self) -> None:
        values, scale = self.values, self.scale
        where = f"{values.file}: {values.name}"
        if scale is None:
            if values.kind == "int8":
                raise DataError(f"{where} is int8, but there is no {values.name}_scale [N]; add it or store floats")
            return
        if values.kind != "int8":
            raise DataError(
                f"{where} is {values.kind}, but there is a {scale.name}; only int8 has scales; remove it or store int8"
            )
        if scale.kind not in ("float16", "float32", "float64"):
            raise DataError(f"{scale.file}: {scale.name} has dtype {scale.kind}; store it as float32")
        if scale.shape != values.shape[:1]:
            raise DataError(
                f"{scale.file}: {scale.name} has shape {scale.shape}; it must be {values.shape[:1]}, one scale per row"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


def _add_header(digest: Any, array: StoredArray) -> None:
    digest.update(f"{array.name} {array.kind} {array.dtype.byteorder} {list(array.shape)}\n".encode())


def hash_rows(rows: NDArray) -> NDArray[np.int64]:
    """Python's hash of the bytes of every row [n, ...], int64 [n]; equal rows have equal hashes."""
    rows = np.ascontiguousarray(rows)
    return np.fromiter(map(hash, rows.view(f"V{rows[0].nbytes}").ravel().tolist()), np.int64, len(rows))
