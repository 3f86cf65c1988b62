"""The gallery: named targets among which predictions find their nearest neighbours.

G candidates, D embedding dimension
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from energy_flow.data.pairs import read_rows
from energy_flow.data.samples import Samples

_SAME = 0.999  # cosine above which two rows are the same text; int8 storage changes the cosine by 0.0001


@dataclass(frozen=True)
class Gallery:
    """Candidates with names; equal names with the same embedding are one candidate."""

    names: list[str]
    target: Tensor  # [G, D]
    row: Tensor  # int64 [G]: row of each candidate in its file, or in the concatenated splits

    @classmethod
    def from_file(cls, path: str) -> Self:
        """The targets of a file; without names they are called `row 0`, `row 1`, ...

        Raises:
            DataError: the file is unusable.
        """
        target, names = read_rows(path, "target", True, "gallery")
        return cls._distinct(names or _numbered("row", len(target)), target)

    @classmethod
    def from_splits(cls, splits: Mapping[str, Samples]) -> Self:
        """The targets of all splits in order; without names they are called `test 0`, `test 1`, ..."""
        names = [name for split, dataset in splits.items() for name in names_of(split, dataset)]
        return cls._distinct(names, torch.cat([dataset.all()[1] for dataset in splits.values()]))

    @classmethod
    def _distinct(cls, names: Sequence[str], target: Tensor) -> Self:
        first: dict[str, int] = {}
        of_name = torch.tensor([first.setdefault(name, row) for row, name in enumerate(names)])
        rows, unit = torch.arange(len(names)), normalize(target, dim=1)
        row = rows[(of_name == rows) | ((unit * unit[of_name]).sum(1) < _SAME)]
        return cls([names[index] for index in row.tolist()], target[row], row)

    def find(self, name: str) -> list[int]:
        """Indices of the candidates with this name."""
        return [index for index, other in enumerate(self.names) if other == name]


def names_of(split: str, dataset: Samples) -> list[str]:
    """The names of a split's rows, or names made of split and row number."""
    return dataset.names or _numbered(split, len(dataset))


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {row}" for row in range(count)]
