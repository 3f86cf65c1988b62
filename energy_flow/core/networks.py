"""The networks of a flow lattice: their settings, and the parts that fit them.

A part is the shipped one, or one of the class that its section names in `_target_`. The protocols of such classes stand
in `energy_flow.core.parts`.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator
from torch import nn

from energy_flow import targets
from energy_flow.core.embedding_mapper import IdentityIn, IdentityOut, MapIn, MapOut
from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.energy_lattice import Count, LatticeSettings
from energy_flow.core.simple_neuron import SimpleNeuron
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
    # None, and so in every file from before these keys: the shipped part.
    neuron: dict[str, Any] | None = None
    carrier: dict[str, Any] | None = None
    map_in: dict[str, Any] | None = None
    map_out: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.maps == "identity" and self.map_hidden is not None:
            raise ValueError(
                f"model.map_hidden = {self.map_hidden}: model.maps = identity has no hidden layer. "
                "Set model.map_hidden=null, or model.maps=learned"
            )
        if self.maps == "identity" and (self.map_in is not None or self.map_out is not None):
            raise ValueError(
                "model.maps = identity: a map of model.map_in or model.map_out is not the identity. Set "
                "model.maps=learned, or both maps to null"
            )
        return self


def make_neuron(lattice: LatticeSettings, model: ModelSettings) -> Any:
    """The neuron, which keeps the protocol `Neuron` or `SensingNeuron`."""
    if model.neuron is None:
        return SimpleNeuron(model.energy_dim, model.features)
    return _part(model.neuron, "model.neuron", lattice, model)


def make_carrier(lattice: LatticeSettings, model: ModelSettings) -> Any:
    """The carrier, which keeps the protocol `Carrier`."""
    if model.carrier is None:
        return EnergyCarrier(model.features, model.energy_dim, model.hidden_size, model.num_layers)
    return _part(model.carrier, "model.carrier", lattice, model)


def _part(
    entry: Mapping[str, Any], key: str, lattice: LatticeSettings, model: ModelSettings, dim: int | None = None
) -> nn.Module:
    """Build a part of a class that the config names. It gets the sizes that its constructor asks for by these names.

    Raises:
        ConfigError: it can't be built, or it isn't a module.
    """
    sizes = {
        "energy_dim": model.energy_dim,
        "features": model.features,
        "width": lattice.width,
        "height": lattice.height,
        "num_cells": lattice.num_cells,
        "num_steps": lattice.num_steps,
    }
    part = targets.build(entry, key, sizes if dim is None else {**sizes, "embedding_dim": dim})
    if not isinstance(part, nn.Module):
        raise ConfigError(f"{key}._target_ = {entry['_target_']}: gives a {type(part).__name__}, not a torch.nn.Module")
    return part


def make_map_in(dim: int, lattice: LatticeSettings, model: ModelSettings) -> Any:
    """The map from embeddings [B, D] to surfaces [B, S, E].

    Args:
        dim: D.
        lattice: sets S.
        model: sets E and the kind of the map.

    Raises:
        ConfigError: the maps are the identity, and D isn't S * E, or flows take no step.
    """
    cells, energy = lattice.num_cells, model.energy_dim
    if model.map_in is not None:
        return _part(model.map_in, "model.map_in", lattice, model, dim)
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


def make_map_out(dim: int, map_in: nn.Module, lattice: LatticeSettings, model: ModelSettings) -> Any:
    """The map from surfaces [B, S, E] to embeddings [B, D]. A linear one starts as the inverse of a linear map in."""
    if model.map_out is not None:
        map_out = _part(model.map_out, "model.map_out", lattice, model, dim)
    elif model.maps == "identity":
        map_out = IdentityOut()
    else:
        map_out = MapOut(dim, lattice.num_cells, model.energy_dim, model.map_hidden)
    if type(map_in) is MapIn and type(map_out) is MapOut and map_in.is_linear and map_out.is_linear:
        map_out.start_as_inverse(map_in, SKIP_SHARE if model.skip else 1.0)
    return map_out


def make_aggregation(lattice: LatticeSettings, model: ModelSettings) -> nn.Module | None:
    """The aggregation, which keeps the protocol `Aggregation`; None: the shipped one."""
    if lattice.aggregation is None:
        return None
    return _part(lattice.aggregation, "lattice.aggregation", lattice, model)
