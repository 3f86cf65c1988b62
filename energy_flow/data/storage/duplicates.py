"""Duplicate rows within a split, and between splits, where they are leaks.

N rows of a split
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from energy_flow.data.storage.columns import Survey, hash_rows

# Hashes of the rows of a split, int64 [N], by `source`, `target` and `pair`. With 64 bits, different rows collide in
# about 3 of 10^8 files of a million rows.
Hashes = dict[str, NDArray[np.int64]]


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


def pair_hashes(source: Survey, target: Survey) -> Hashes:
    """The hashes of a split from the surveys of its sides."""
    pair = hash_rows(np.stack([source.hashes, target.hashes], axis=1))
    return {"source": source.hashes, "target": target.hashes, "pair": pair}


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


def duplicate_warnings(splits: Mapping[str, Hashes]) -> Iterator[str]:
    """Warn about duplicate pairs within a split, and about sources that two splits share, one message each."""
    for split, hashes in splits.items():
        if (found := duplicates_within(hashes["pair"])).count:
            yield (
                f"data.{split}: {found.count:,} of {len(hashes['pair']):,} pairs are duplicates: row {found.row} "
                f"repeats row {found.of}, for example. Such pairs count more than once"
            )
    for one, other in combinations(splits, 2):
        source, pair = (duplicates_between(splits[other][kind], splits[one][kind]) for kind in ("source", "pair"))
        if source.count:
            yield (
                f"data.{other}: {source.count:,} of {len(splits[other]['source']):,} sources are also in data.{one} "
                f"({pair.count:,} of them with the same target): row {source.row} is row {source.of} there, for "
                "example. This is a leak: results look better than they are"
            )
