"""Exact copies of rows: within a split, and between splits, where they are leaks.

N rows of a split.
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

    64 bits: two different rows of a million have the same hash in 3 of 10^8 files.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    pair: NDArray[np.int64]

    @classmethod
    def of(cls, source: Survey, target: Survey) -> Self:
        return cls(source.hashes, target.hashes, hash_rows(np.stack([source.hashes, target.hashes], axis=1)))


@dataclass(frozen=True)
class Copies:
    """Rows that are copies of others.

    Attributes:
        count: rows that are a copy of an earlier one, or of a row of another split.
        row, of: the first of them, and which row it is a copy of; None where there is none.
    """

    count: int
    row: int | None
    of: int | None


def copies_within(hashes: NDArray[np.int64]) -> Copies:
    """The rows that occur earlier in the same split."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = first[inverse]
    copied = np.flatnonzero(earliest != np.arange(len(hashes)))
    return _found(copied, earliest[copied])


def copies_between(hashes: NDArray[np.int64], others: NDArray[np.int64]) -> Copies:
    """The rows that another split has too."""
    known, first = np.unique(others, return_index=True)
    place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    copied = np.flatnonzero(known[place] == hashes)
    return _found(copied, first[place[copied]])


def _found(rows: NDArray[np.int64], of: NDArray[np.int64]) -> Copies:
    return Copies(len(rows), int(rows[0]), int(of[0])) if len(rows) else Copies(0, None, None)


def copy_warnings(splits: Mapping[str, PairHashes]) -> Iterator[str]:
    """What is worth a warning, a line each: pairs that stand twice, sources or pairs of one split in another."""
    for split, hashes in splits.items():
        if (found := copies_within(hashes.pair)).count:
            yield (
                f"data.{split}: {found.count:,} of {len(hashes.pair):,} pairs are copies of earlier ones, the first is "
                f"row {found.row}, of row {found.of}: they count more than once"
            )
    for one, other in combinations(splits, 2):
        source, pair = (
            copies_between(getattr(splits[other], side), getattr(splits[one], side)) for side in ("source", "pair")
        )
        if source.count:
            yield (
                f"data.{other}: {source.count:,} of {len(splits[other].source):,} sources stand in data.{one} too "
                f"({pair.count:,} of them with the same target), the first is row {source.row}, row {source.of} there: "
                "a leak, results look better than they are"
            )
