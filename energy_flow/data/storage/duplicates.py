"""Duplicate rows within a split, and between splits, where they are leaks.

N rows of a split
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Self

import numpy as np
from numpy.typing import NDArray

from energy_flow.data.storage.columns import Survey, hash_rows


@dataclass(frozen=True)
class PairHashes:
    """Hashes of the rows of a split, int64 [N].

    With 64 bits, different rows collide in about 3 of 10^8 files of a million rows.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    pair: NDArray[np.int64]

    @classmethod
    def of(cls, source: Survey, target: Survey) -> Self:
        return cls(source.hashes, target.hashes, hash_rows(np.stack([source.hashes, target.hashes], axis=1)))


@dataclass(frozen=True)
class Duplicates:
    """Rows that equal an earlier row of the same split, or a row of another split.

    Attributes:
        count: number of these rows.
        row, of: the first of them, and the row that it equals; None without duplicates.
    """

    count: int
    row: int | None
    of: int | None


def duplicates_within(hashes: NDArray[np.int64]) -> Duplicates:
    """The rows that equal an earlier row."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = first[inverse]
    repeated = np.flatnonzero(earliest != np.arange(len(hashes)))
    return _found(repeated, earliest[repeated])


def duplicates_between(hashes: NDArray[np.int64], others: NDArray[np.int64]) -> Duplicates:
    """The rows that equal a row of another split."""
    known, first = np.unique(others, return_index=True)
    place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    repeated = np.flatnonzero(known[place] == hashes)
    return _found(repeated, first[place[repeated]])


def _found(rows: NDArray[np.int64], of: NDArray[np.int64]) -> Duplicates:
    return Duplicates(len(rows), int(rows[0]), int(of[0])) if len(rows) else Duplicates(0, None, None)


def duplicate_warnings(splits: Mapping[str, PairHashes]) -> Iterator[str]:
    """Warn about duplicate pairs within a split, and about sources that two splits share, one message each."""
    for split, hashes in splits.items():
        if (found := duplicates_within(hashes.pair)).count:
            yield (
                f"data.{split}: {found.count:,} of {len(hashes.pair):,} pairs are duplicates: row {found.row} "
                f"repeats row {found.of}, for example. Such pairs count more than once"
            )
    for one, other in combinations(splits, 2):
        source, pair = (
            duplicates_between(getattr(splits[other], side), getattr(splits[one], side)) for side in ("source", "pair")
        )
        if source.count:
            yield (
                f"data.{other}: {source.count:,} of {len(splits[other].source):,} sources are also in data.{one} "
                f"({pair.count:,} of them with the same target): row {source.row} is row {source.of} there, for "
                "example. This is a leak: results look better than they are"
            )
