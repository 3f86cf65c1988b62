"""The networks of a flow lattice: their settings, and the two maps that fit them."""

from typing import Literal, Self

from pydantic import model_validator

from energy_flow.core.embedding_mapper import IdentityIn, IdentityOut, MapIn, MapOut
from energy_flow.core.energy_lattice import Count, LatticeSettings
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings

# With a skip the input is added to the output anyway: at first the surface gives back only this share of the input.
SKIP_SHARE = 0.1


class ModelSettings(Settings):
    """The networks (config group `model`)."""

    energy_dim: Count
    residual_energy: bool
    features: Count
    hidden_size: Count
    num_layers: Count
    maps: Literal["learned", "identity"]
    map_hidden: Count | None
    skip: bool

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.maps == "identity" and self.map_hidden is not None:
            raise ValueError(
                f"model.map_hidden = {self.map_hidden}: model.maps = identity has no hidden layer. "
                "Set model.map_hidden=null, or model.maps=learned"
            )
        return self


def make_map_in(dim: int, lattice: LatticeSettings, model: ModelSettings) -> MapIn | IdentityIn:
    """The map from embeddings [B, D] to surfaces [B, S, E].

    Args:
        dim: D.
        lattice: sets S.
        model: sets E and the kind of the map.

    Raises:
        ConfigError: the maps are the identity, and D isn't S * E, or flows take no step.
    """
    cells, energy = lattice.num_cells, model.energy_dim
    if model.maps == "learned":
        return MapIn(dim, cells, energy, model.map_hidden)
    if dim != cells * energy:
        raise ConfigError(
            f"model.maps = identity: embeddings of dimension {dim} must be surfaces of lattice.width x lattice.height "
            f"x model.energy_dim = {lattice.width} x {lattice.height} x {energy} = {cells * energy} numbers. "
            "Set lattice.width and lattice.height to the size of the data, or set model.maps=learned"
        )
    if lattice.num_steps == 0:
        raise ConfigError(
            "lattice.max_steps = 0 (or lattice.depth = 1): with model.maps = identity and no step there is nothing to "
            "learn. Set lattice.max_steps=1 or more, or set model.maps=learned"
        )
    return IdentityIn(cells, energy)


def make_map_out(dim: int, map_in: MapIn | IdentityIn, model: ModelSettings) -> MapOut | IdentityOut:
    """The map from surfaces [B, S, E] to embeddings [B, D]. A linear one starts as the inverse of the map in."""
    if isinstance(map_in, IdentityIn):
        return IdentityOut()
    map_out = MapOut(dim, map_in.num_cells, map_in.energy_dim, model.map_hidden)
    if model.map_hidden is None:
        map_out.start_as_inverse(map_in, SKIP_SHARE if model.skip else 1.0)
    return map_out
