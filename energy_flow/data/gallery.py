"""The candidates among which predictions find their nearest: targets with names.

G candidates, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from energy_flow.data.samples import Samples
from energy_flow.data.storage.rows import Rows

_SAME = 0.999  # cosine of two rows of the same text; storing them as int8 takes 0.0001 of it


@dataclass(frozen=True)
class Gallery:
    """Candidates by name; one that occurs again with the same embedding stands once."""

    names: list[str]
    target: Tensor  # [G, D]
    row: Tensor  # int64 [G]: where each one stands in its file, or in its splits one after the other

    @classmethod
    def from_file(cls, path: str) -> Self:
        """The targets of a file; one without names calls them `row 0`, `row 1`, ...

        Raises:
            DataError: a file that can't be used.
        """
        rows = Rows(path, "target", True, "gallery")
        return cls._once(rows.names or _numbered("row", len(rows)), rows.all())

    @classmethod
    def from_splits(cls, splits: Mapping[str, Samples]) -> Self:
        """The targets of all splits, in their order; one without names calls them `test 0`, `test 1`, ..."""
        names = [name for split, dataset in splits.items() for name in names_of(split, dataset)]
        return cls._once(names, torch.cat([dataset.all()[1] for dataset in splits.values()]))

    @classmethod
    def _once(cls, names: Sequence[str], target: Tensor) -> Self:
        first: dict[str, int] = {}
        of_name = torch.tensor([first.setdefault(name, row) for row, name in enumerate(names)])
        rows, unit = torch.arange(len(names)), normalize(target, dim=1)
        row = rows[(of_name == rows) | ((unit * unit[of_name]).sum(1) < _SAME)]
        return cls([names[index] for index in row.tolist()], target[row], row)

    def find(self, name: str) -> list[int]:
        """The candidates of a name."""
        return [index for index, other in enumerate(self.names) if other == name]


def names_of(split: str, dataset: Samples) -> list[str]:
    """The names of a split's rows, or numbers where it has none."""
    return dataset.names or _numbered(split, len(dataset))


def _numbered(what: str, count: int) -> list[str]:
    return [f"{what} {row}" for row in range(count)]
