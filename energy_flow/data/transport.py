"""Travelling energies: generated pairs, on which a model must learn where energies go.

A sample is a surface of energies over the cells of a plane, one number per cell. Its target is the surface after the
energy of every cell has travelled; the displacement depends on the start and on the energy. Lengths are the lattice's
normalised lengths: the plane is [-1, 1] x [-1, 1], and `geometry.cell_centres` are the cells' centres. Energies have no
unit.

**Source.** The energy at the place p = (x, y) is

    e(p) = tanh(a / 2),  a = 2 / (K + 1) * sum over 0 <= j, k < K of c_jk cos(j pi (x + 1) / 2) cos(k pi (y + 1) / 2)

with independent normal c_jk (mean 0, variance 1; so the mean of a² over the plane is 1) and K = `data.waves`. The
shortest half wave of this smooth surface has the length 2 / (K - 1). The surface does not depend on the number of
cells: a finer plane samples the same surface more densely.

**Travel.** The energy e of the cell at p lands at q = fold(p + d(p, e)): `fold` reflects at the borders (a triangular
wave). The displacement d depends on g = `data.strength`. For g = 1, energies of size 1 travel about half the plane:

    rotation_swirl   d = R(g e) p - p + g / 2 exp(-2 |v|²) (-v_y, v_x),  v = p - (1/2, -1/4)
                     a rotation R about the centre by g e radians, plus a swirl about another point
    shear            d = (g (y / 2 + e), 0)

**Target.** Every landing is deposited on the four cells around it, with bilinear weights w. A cell averages its
deposits; if its weights sum to less than 1, the rest counts as energy 0. With c = `data.contrast`:

    target = sum(w exp(c |e|) e) / (sum(w exp(c |e|)) + max(0, 1 - sum(w)))

c = 0 is a plain average. With c > 0 strong energies count more, as in a lattice, which collects its landings by a
softmax over scores |e| / (1 + distance) * (1 + 0.1 * steps). Consider flows that keep their energies, move by d, stay
on the input plane (distance 1) and take T steps. They are exact for c = (1 + 0.1 T) / 2, which is 0.7 for 4 steps. For
c = 0 no lattice is exact; it learns a compromise.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from energy_flow.core.flow_step import fold
from energy_flow.core.geometry import cell_centres, deposit_cells
from energy_flow.data.samples import Batch, Samples
from energy_flow.data.settings import SPLITS, DataSettings
from energy_flow.data.storage.arrays import SIDES, StoredArray
from energy_flow.data.storage.columns import Column
from energy_flow.ops.group_softmax import group_softmax_deposit

# Version of the formulas above. It is part of the fingerprint, which is computed from settings, not from numbers.
FORMULA = 1
_CHUNK_CELLS = 2**18  # cells whose landings are in memory at a time

Rows = Annotated[int, Field(ge=2)]
Field2d = Literal["rotation_swirl", "shear"]


class TransportSettings(DataSettings):
    """Travelling energies; the module has the formulas."""

    name: Literal["transport"]
    field: Field2d
    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    contrast: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    width: Annotated[int, Field(ge=2)]
    height: Annotated[int, Field(ge=2)]
    waves: Annotated[int, Field(ge=1)]
    train: Rows
    val: Rows
    test: Rows
    surface_seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.normalize:
            raise ValueError(
                "data.normalize = true: the size of an energy decides how far it travels, and normalised rows lose it. "
                "Set data.normalize=false"
            )
        if self.waves > min(self.width, self.height):
            raise ValueError(
                f"data.waves = {self.waves}: {self.width} x {self.height} cells can represent at most "
                f"{min(self.width, self.height)} waves. Lower it, or raise data.width and data.height"
            )
        return self

    def has(self, split: str) -> bool:
        return True

    def open(self, split: str) -> "TransportDataset":
        return TransportDataset(self, split)

    def columns(self, split: str) -> tuple[Column, Column]:
        dataset = TransportDataset(self, split)
        sides = ((side, rows.numpy()) for side, rows in zip(SIDES, dataset.all(), strict=True))
        source, target = (
            StoredArray(Path(dataset.where), side, "float32", rows.dtype, rows.shape, offset=None, numbers=rows)
            for side, rows in sides
        )
        return Column(source, None, self.normalize), Column(target, None, self.normalize)

    def landings(self, source: Tensor) -> Tensor:
        """Landing places (x, y) of the energies of surfaces [B, S], [B, S, 2]."""
        start = cell_centres(self.width, self.height, source.dtype, source.device)
        return fold(start + FIELDS[self.field](start, source, self.strength))

    def targets(self, source: Tensor) -> Tensor:
        """The surfaces [B, S] after the travel of their energies, [B, S]."""
        cells, weights = deposit_cells(self.landings(source), self.width, self.height, "bilinear")
        first_key = torch.arange(len(source))[:, None, None] * source.shape[1]
        energies, scores = source.reshape(-1, 1), self.contrast * source.abs().flatten()
        keys, weights = (cells + first_key).flatten(0, 1), weights.flatten(0, 1)
        average, _ = group_softmax_deposit(scores, energies, keys, weights, source.numel(), bound=self.contrast)
        return average.view_as(source)


class TransportDataset(Samples):
    """One split, generated as a whole and held in memory. It depends on the settings alone, not on other splits."""

    def __init__(self, settings: TransportSettings, split: str) -> None:
        self.settings = settings
        influential = {"name", "field", "strength", "contrast", "width", "height", "waves", "surface_seed"}
        recipe = settings.model_dump(include=influential)
        recipe |= {"formula": FORMULA, "split": split, "rows": getattr(settings, split)}
        self.fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self._source = _surfaces(settings, split)
        chunks = self._source.split(max(1, _CHUNK_CELLS // self.dim))
        self._target = torch.cat([settings.targets(chunk) for chunk in chunks])

    @property
    def dim(self) -> int:
        return self.settings.width * self.settings.height

    @property
    def where(self) -> str:
        return f"transport, surface_seed {self.settings.surface_seed}"

    @property
    def description(self) -> str:
        settings = self.settings
        return (
            f"{settings.width} x {settings.height} cells, {settings.waves} waves, "
            f"field {settings.field} of strength {settings.strength:g}, contrast {settings.contrast:g}"
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        index = torch.as_tensor(rows, dtype=torch.int64)
        return {"source": self._source[index], "target": self._target[index], "row": index}

    def all(self) -> tuple[Tensor, Tensor]:
        return self._source.clone(), self._target.clone()


def _surfaces(settings: TransportSettings, split: str) -> Tensor:
    """Random smooth surfaces [N, S], float32."""
    random = np.random.default_rng([settings.surface_seed, SPLITS.index(split)])
    shape = (getattr(settings, split), settings.waves, settings.waves)
    coefficients = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
    x, y = (_cosines(settings.waves, size) for size in (settings.width, settings.height))
    level = torch.einsum("njk,jx,ky->nyx", coefficients, x, y) * (2 / (settings.waves + 1))
    return torch.tanh(level / 2).flatten(1)


def _cosines(waves: int, num_cells: int) -> Tensor:
    """cos(j pi (x + 1) / 2) at the centres of an axis, [waves, num_cells]."""
    place = torch.arange(num_cells, dtype=torch.float64) / (num_cells - 1)
    return torch.cos(math.pi * torch.outer(torch.arange(waves, dtype=torch.float64), place)).float()


def _rotation_swirl(start: Tensor, energy: Tensor, strength: float) -> Tensor:
    angle = strength * energy
    cos, sin = angle.cos(), angle.sin()
    x, y = start.unbind(-1)
    rotated = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    from_swirl = start - start.new_tensor([0.5, -0.25])
    swirl = 0.5 * strength * torch.exp(-2 * from_swirl.square().sum(-1, keepdim=True))
    return rotated - start + swirl * torch.stack([-from_swirl[..., 1], from_swirl[..., 0]], dim=-1)


def _shear(start: Tensor, energy: Tensor, strength: float) -> Tensor:
    along = strength * (0.5 * start[..., 1] + energy)
    return torch.stack([along, torch.zeros_like(along)], dim=-1)


# Name -> function (start [S, 2], energy [B, S], strength) -> displacement [B, S, 2].
FIELDS: dict[Field2d, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rotation_swirl": _rotation_swirl,
    "shear": _shear,
}
