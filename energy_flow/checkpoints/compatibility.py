"""Check that a loaded checkpoint fits: its weights a model, its settings a run, its model a lattice."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from energy_flow import targets
from energy_flow.checkpoints.format import KEY, HyperParameters
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.settings import flatten

if TYPE_CHECKING:  # a checkpoint can be used without Lightning
    import lightning.pytorch as pl

Module = TypeVar("Module", bound="pl.LightningModule")
_LISTED = 3  # weights that a message names
_FEW_LAYERS = 100  # that are built in no time
_OF_THE_MODEL = ("width", "height", "depth", "aggregation")  # other keys of `lattice`, noise say, may change on resume


def check_model(
    module_class: type[Module],
    checkpoint: Mapping[str, Any],
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check that hyper-parameters, with `changes`, describe the module of a checkpoint's weights, without its memory.

    Returns:
        The arguments of `module_class`.

    Raises:
        CheckpointError: they describe no module, or another one.
    """
    given = {**checkpoint["hyper_parameters"], **(changes or {})}
    described = {name: given[name] for name in HyperParameters.model_fields}
    check_depth({name: described[name] for name in ("lattice", "model")}, checkpoint["state_dict"], path)
    try:
        with targets.from_file(), torch.device("meta"):  # without memory: wrong sizes may be huge
            check_weights(checkpoint["state_dict"], module_class(**described), path)
    except (ConfigError, RuntimeError, TypeError, OverflowError) as error:
        reason = targets.one_line(error)[:600]  # a value in a file may be long
        raise CheckpointError(f"ckpt_path = {path}: its hyper_parameters describe no model: {reason}") from error
    return described


def restore(
    module_class: type[Module],
    checkpoint: Mapping[str, Any],
    path: str | Path,
    rollout: Mapping[str, Any] | None = None,
) -> Module:
    """Build the module of a loaded checkpoint on the CPU, after `check_model`; `rollout` isn't saved with a model."""
    described = check_model(module_class, checkpoint, path)
    with targets.from_file():
        module = module_class(**described, rollout=rollout)
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def on_lattice(
    checkpoint: Mapping[str, Any], width: int | None, height: int | None, dim: int, path: str | Path
) -> dict[str, Any]:
    """Move a loaded checkpoint to a lattice of another width or height (None: as it was), for embeddings [dim].

    Raises:
        CheckpointError: embeddings of another dimension, or maps that belong to the cells they were trained on.
    """
    size = {name: value for name, value in (("width", width), ("height", height)) if value is not None}
    parameters, info = checkpoint["hyper_parameters"], checkpoint[KEY]
    identity = _has_identity_maps(parameters["model"])
    if size and not identity:
        named = ", ".join(f"lattice.{name} = {value}" for name, value in size.items())
        raise CheckpointError(
            f"{named}: ckpt_path = {path} has learned maps, which belong to their cells. Only a model "
            "trained with model.maps=identity runs on another lattice; leave lattice.width and lattice.height null"
        )
    if not size and dim != info["embedding_dim"]:
        remedy = "Give data made with the same encoder as the training data"
        if identity:
            remedy = "Give data of that size, or a lattice of theirs: lattice.width=W lattice.height=H"
        raise CheckpointError(
            f"ckpt_path = {path}: takes embeddings of dimension {info['embedding_dim']}, the data have {dim}. {remedy}"
        )
    parameters = {**parameters, "dim": dim, "lattice": {**parameters["lattice"], **size}}
    return {**checkpoint, "hyper_parameters": parameters, KEY: {**info, "embedding_dim": dim}}


def _has_identity_maps(model: Mapping[str, Any]) -> bool:
    """Whether both maps of a config section `model` are the identity, in either of the two ways to say so."""
    maps = [model.get("map_in"), model.get("map_out")]
    if maps == [None, None]:
        return model.get("maps") == "identity"
    named = [section.get("_target_") if isinstance(section, Mapping) else None for section in maps]
    return named == [f"energy_flow.core.embedding_mapper.Identity{way}" for way in ("In", "Out")]


def check_weights(state_dict: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Raise a CheckpointError with the first weights that aren't those of a module, by their names and shapes."""
    ours = module.state_dict()
    shapes = [{name: list(value.shape) for name, value in weights.items()} for weights in (state_dict, ours)]
    lines = list(_differences(*shapes))
    if lines:
        more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        listed = "\n".join([*(f"  {line}" for line in lines[:_LISTED]), *more])
        raise CheckpointError(f"ckpt_path = {path}: its weights are not those of the model:\n{listed}")


def check_depth(described: Mapping[str, Any], state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a CheckpointError for a part of more layers than there are weights: building layers takes time."""
    for key, value in _values(described):
        if key.endswith("layers") and isinstance(value, int) and value > max(len(state_dict), _FEW_LAYERS):
            raise CheckpointError(f"ckpt_path = {path}: {key} = {value}, but {len(state_dict)} weights")


def _values(described: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key, also inside lists."""
    if isinstance(described, Mapping):
        for name, value in described.items():
            yield from _values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(described, list | tuple):
        for index, value in enumerate(described):
            yield from _values(value, f"{key}[{index}]")
    else:
        yield key, described


def check_resume(checkpoint: Mapping[str, Any], hyper_parameters: Mapping[str, Any], path: str | Path) -> None:
    """Raise a CheckpointError with every key of architecture or optimiser that differs: training can't resume."""
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"ckpt_path = {path}: holds weights only, training can't resume from it. Write checkpoints with "
            "callbacks.checkpoint.save_weights_only=false"
        )
    saved = checkpoint["hyper_parameters"]
    _refuse(path, "belongs to another architecture", _architecture(saved), _architecture(hyper_parameters))
    # Lightning restores the optimiser with its old values: new ones would be shown, but not used.
    before, now = _prefixed("optimizer", saved), _prefixed("optimizer", hyper_parameters)
    now = {key: value for key, value in now.items() if key in before or value}  # a newer key that is off is no change
    _refuse(path, "its optimiser keeps its settings", before, now)


def _refuse(path: str | Path, why: str, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    lines = list(_differences(saved, ours))
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise CheckpointError(f"ckpt_path = {path}: {why}:\n{listed}\nSet them as in the checkpoint, or train anew")


def _prefixed(section: str, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    return flatten(hyper_parameters[section], f"{section}.")


def _architecture(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    lattice = {name: hyper_parameters["lattice"].get(name) for name in _OF_THE_MODEL}
    return {
        "embedding dimension": hyper_parameters["dim"],
        **flatten(lattice, "lattice."),
        **_prefixed("model", hyper_parameters),
    }


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*saved, *ours]):
        if saved.get(key) != ours.get(key):
            yield f"{key}: {saved.get(key)} in the checkpoint, {ours.get(key)} here"
