"""Surfaces whose energies travel: pairs made from a seed, on which a model has to learn where to go.

A sample is a surface of energies over the cells of a plane, one number per cell; its target is the surface after every
cell's energy has travelled, by a displacement that depends on where it starts and on how strong it is. Lengths are the
lattice's normalised ones: the plane is [-1, 1] wide and high, cell (x, y) has the centre of `geometry.cell_centres`.
Energies have no unit.

**Source.** The energy at the place p = (x, y) is

    e(p) = tanh(a / 2),  a = 2 / (K + 1) * sum over 0 <= j, k < K of c_jk cos(j pi (x + 1) / 2) cos(k pi (y + 1) / 2)

with independent normal c_jk (mean 0, variance 1; so the mean of a² over the plane is 1) and K = `data.waves`: a smooth
surface whose shortest half wave is 2 / (K - 1) long. It doesn't depend on the number of cells: the same row on a finer
plane is the same surface, sampled more densely.

**Travel.** The energy e of the cell at p lands at q = fold(p + d(p, e)): `fold` reflects at the borders (a triangular
wave). The displacement d, with the strength g = `data.strength` (1: energies of size one travel about half a plane):

    rotation_swirl   d = R(g e) p - p + g / 2 exp(-2 |v|²) (-v_y, v_x),  v = p - (1/2, -1/4)
                     a rotation R about the centre by g e radians, and a swirl about a point off the centre
    shear            d = (g (y / 2 + e), 0)

**Target.** Every landing is deposited on the four cells around it, with bilinear weights w. What arrives in a cell is
averaged, and the share that misses to a whole weight is empty. With c = `data.contrast`:

    target = sum(w exp(c |e|) e) / (sum(w exp(c |e|)) + max(0, 1 - sum(w)))

c = 0 is a plain average. With c > 0 strong energies count more, as in a lattice, which collects its landings by a
softmax over scores |e| / (1 + distance) * (1 + 0.1 * steps). Flows that keep their energies, move by d, stay on the
input plane (distance 1) and take T steps are exact for c = (1 + 0.1 T) / 2: 0.7 for 4 steps. For c = 0 nothing that a
lattice can do is exact; what it learns is a compromise.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from energy_flow.core.flow_step import fold
from energy_flow.core.geometry import cell_centres, deposit_cells
from energy_flow.data.samples import Batch, Samples
from energy_flow.data.settings import SPLITS, DataSettings
from energy_flow.data.storage.arrays import SIDES, HeldArray
from energy_flow.data.storage.columns import Column
from energy_flow.ops.group_softmax import group_softmax_deposit

# Counts the changes of the formulas above: it goes into the fingerprint, which knows nothing of the numbers.
FORMULA = 1
_CHUNK_CELLS = 2**18  # cells whose landings stand at a time

Rows = Annotated[int, Field(ge=2)]
Field2d = Literal["rotation_swirl", "shear"]


class TransportSettings(DataSettings):
    """Surfaces whose energies travel; see the module for the formulas."""

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
                "data.normalize = true: how strong an energy is says how far it travels, and rows of length 1 would "
                "lose it. Set data.normalize=false"
            )
        if self.waves > min(self.width, self.height):
            raise ValueError(
                f"data.waves = {self.waves}: {self.width} x {self.height} cells can't tell more than "
                f"{min(self.width, self.height)} waves apart. Lower it, or raise data.width and data.height"
            )
        return self

    def has(self, split: str) -> bool:
        return True

    def open(self, split: str) -> "TransportDataset":
        return TransportDataset(self, split)

    def columns(self, split: str) -> tuple[Column, Column]:
        dataset = TransportDataset(self, split)
        source, target = (
            Column(HeldArray.of(dataset.where, side, rows.numpy()), None, self.normalize)
            for side, rows in zip(SIDES, dataset.all(), strict=True)
        )
        return source, target

    def landings(self, source: Tensor) -> Tensor:
        """Where the energies of surfaces [B, S] land: (x, y), [B, S, 2]."""
        start = cell_centres(self.width, self.height, source.dtype, source.device)
        return fold(start + FIELDS[self.field](start, source, self.strength))

    def targets(self, source: Tensor) -> Tensor:
        """The surfaces [B, S] after their energies have travelled, [B, S]."""
        cells, weights = deposit_cells(self.landings(source), self.width, self.height, "bilinear")
        first_key = torch.arange(len(source))[:, None, None] * source.shape[1]
        energies, scores = source.reshape(-1, 1), self.contrast * source.abs().flatten()
        keys, weights = (cells + first_key).flatten(0, 1), weights.flatten(0, 1)
        average, _ = group_softmax_deposit(scores, energies, keys, weights, source.numel(), bound=self.contrast)
        return average.view_as(source)


class TransportDataset(Samples):
    """One split, made at once and held in memory: the same for the same settings, independent of other splits."""

    def __init__(self, settings: TransportSettings, split: str) -> None:
        self.settings = settings
        decides = {"name", "field", "strength", "contrast", "width", "height", "waves", "surface_seed"}
        recipe = settings.model_dump(include=decides)
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


# Name -> displacement [B, S, 2] of energies [B, S] that start at [S, 2], by the strength.
FIELDS: dict[Field2d, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rotation_swirl": _rotation_swirl,
    "shear": _shear,
}
