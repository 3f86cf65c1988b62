"""What a checkpoint says of itself, and whether it fits."""

import importlib.metadata
import platform
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from energy_flow.checkpoints.archive import read_archive
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.version import __version__

if TYPE_CHECKING:  # a checkpoint can be read without Lightning
    import lightning.pytorch as pl

KEY = "energy_flow"
Dimension = Annotated[int, Field(ge=1)]
Section = dict[str, Any]
Module = TypeVar("Module", bound="pl.LightningModule")
_LISTED = 3  # weights that a message names
_FEW_LAYERS = 100  # that are made in no time
_LATTICE_SIZE = ("width", "height", "depth")  # its rules, noise say, may change when a run goes on


def provenance(config: dict[str, Any] | None, dim: int, fingerprint: dict[str, str]) -> dict[str, Any]:
    """Where a checkpoint comes from, as plain containers."""
    return {
        "config": config,
        "embedding_dim": dim,
        "data_fingerprint": dict(fingerprint),
        "versions": {
            "energy_flow": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": importlib.metadata.version("lightning"),
        },
    }


def origin(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Config and data fingerprint of the run that wrote a checkpoint."""
    info = checkpoint[KEY]
    return info["config"], dict(info["data_fingerprint"])


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class _Config(_Part):
    data: Section = {}


class _Provenance(_Part):
    config: _Config | None
    embedding_dim: Dimension
    data_fingerprint: dict[str, str]


class _HyperParameters(_Part):
    dim: Dimension
    lattice: Section
    model: Section
    loss: Section
    optimizer: Section
    seed: Annotated[int, Field(ge=0)]


class _Contents(_Part):
    """What is read of every checkpoint of ours; Lightning's parts are missing where there are weights only."""

    lightning_version: Annotated[str, Field(alias="pytorch-lightning_version", pattern=r"^2\.\d+(\.\w+)*$")]
    energy_flow: _Provenance
    hyper_parameters: _HyperParameters
    state_dict: dict[str, Tensor]
    optimizer_states: list[Section] = []
    lr_schedulers: list[Section] = []
    loops: Section = {}
    callbacks: dict[str, Section] = {}


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it can run code.

    Raises:
        CheckpointError: missing, damaged, or not written by energy_flow.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise CheckpointError(f"ckpt_path = {path}: is a folder; give a checkpoint in it, such as best.ckpt")
    if not path.is_file():
        raise CheckpointError(f"ckpt_path = {path}: there is no such file")
    try:
        checkpoint = _read(path)
    except _DamagedError as error:
        others = ", ".join(other.name for other in beside(path) if other != path and damage(other) is None)
        remedy = f"Whole ones beside it: {others}" if others else "There is no whole one beside it"
        raise CheckpointError(f"ckpt_path = {path}: refused: damaged, or no checkpoint ({error}). {remedy}") from error
    try:
        _Contents.model_validate(checkpoint)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        wrong = f"{'.'.join(map(str, detail['loc'])) or 'its contents'}: {detail['msg']}"
        raise CheckpointError(f"ckpt_path = {path}: not a checkpoint of energy_flow ({wrong})") from error
    _refuse_tricks(checkpoint, path)
    return checkpoint


def _refuse_tricks(checkpoint: Mapping[str, Any], path: Path) -> None:
    """What no run writes, and Lightning would follow: names of code to build a module with, paths out of a folder."""
    code = [name for name in checkpoint["hyper_parameters"] if name.startswith("_")]
    if code:
        raise CheckpointError(f"ckpt_path = {path}: hyper_parameters.{code[0]}: a checkpoint may not say what is built")
    left = [text for text in _texts(checkpoint.get("callbacks")) if ".." in Path(text).parts]
    if left:
        raise CheckpointError(f"ckpt_path = {path}: callbacks: the path {left[0]!r} leaves its folder")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _texts(part)


def beside(path: Path) -> list[Path]:
    """All checkpoints in the folder of a file, those to go on from first: the last ones, then the others, by age."""

    def newer(found: Path) -> tuple[bool, float]:
        return found.name.startswith("last"), found.stat().st_mtime

    return sorted(path.parent.glob("*.ckpt"), key=newer, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint; None: it is whole."""
    try:
        _read(path)
    except _DamagedError as error:
        return str(error)
    return None


class _DamagedError(CheckpointError):
    """The bytes of a file are not those of a checkpoint; says why."""


def _read(path: Path) -> Any:
    try:
        return read_archive(path)
    except Exception as error:  # of any type: zip and unpickler run on damaged bytes
        raise _DamagedError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointError | RuntimeError | OSError | zipfile.BadZipFile):
        return str(error).strip().split("\n")[0][:200]
    return "not made of tensors and plain containers"  # the unpickler's messages say nothing, or how to let it run code


def check_model(
    module_class: type[Module],
    checkpoint: Mapping[str, Any],
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """See that a loaded checkpoint's hyper-parameters describe the module of its weights, without memory for it.

    Args:
        changes: hyper-parameters that stand in for those of the checkpoint.

    Returns:
        The arguments of `module_class`.

    Raises:
        CheckpointError: they describe no module, or another one.
    """
    given = {**checkpoint["hyper_parameters"], **(changes or {})}
    described = {name: given[name] for name in _HyperParameters.model_fields}
    check_depth(described["model"].get("num_layers"), checkpoint["state_dict"], path)
    try:
        with torch.device("meta"):  # without memory: sizes that are wrong may be huge
            check_weights(checkpoint["state_dict"], module_class(**described), path)
    except (ConfigError, RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"ckpt_path = {path}: its hyper_parameters describe no model: {reason}") from error
    return described


def restore(
    module_class: type[Module],
    checkpoint: Mapping[str, Any],
    path: str | Path,
    rollout: Mapping[str, Any] | None = None,
) -> Module:
    """The module of a loaded checkpoint, as `module_class.load_from_checkpoint` builds it, on the CPU.

    Args:
        rollout: the config section of this name, which isn't saved with a model.

    Raises:
        CheckpointError: its hyper-parameters describe no module, or another one than that of its weights.
    """
    described = check_model(module_class, checkpoint, path)
    module = module_class(**described, rollout=rollout)
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def on_lattice(
    checkpoint: Mapping[str, Any], width: int | None, height: int | None, dim: int, path: str | Path
) -> dict[str, Any]:
    """A loaded checkpoint's weights on a lattice of another width or height (None: its own), for embeddings of `dim`.

    Raises:
        CheckpointError: embeddings of another dimension, or maps that belong to the cells they were trained on.
    """
    size = {name: value for name, value in (("width", width), ("height", height)) if value is not None}
    parameters, info = checkpoint["hyper_parameters"], checkpoint[KEY]
    identity = parameters["model"].get("maps") == "identity"
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


def check_weights(state_dict: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """See that weights are those of a module: no name more, none less, every shape the same.

    Raises:
        CheckpointError: names the first ones that differ.
    """
    ours = module.state_dict()
    shapes = [{name: list(value.shape) for name, value in weights.items()} for weights in (state_dict, ours)]
    lines = list(_differences(*shapes))
    if lines:
        more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        listed = "\n".join([*(f"  {line}" for line in lines[:_LISTED]), *more])
        raise CheckpointError(f"ckpt_path = {path}: its weights are not those of the model:\n{listed}")


def check_depth(num_layers: Any, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """See that a model isn't said to have more layers than there are weights: building layers takes time.

    Raises:
        CheckpointError: it is.
    """
    if isinstance(num_layers, int) and num_layers > max(len(state_dict), _FEW_LAYERS):
        raise CheckpointError(f"ckpt_path = {path}: model.num_layers = {num_layers}, but {len(state_dict)} weights")


def check_resume(checkpoint: Mapping[str, Any], hyper_parameters: Mapping[str, Any], path: str | Path) -> None:
    """See that training can go on from a checkpoint: its weights fit the model, the optimiser goes on as it was.

    Raises:
        CheckpointError: names every key that differs.
    """
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"ckpt_path = {path}: holds weights only, training can't go on from it. Write checkpoints with "
            "callbacks.checkpoint.save_weights_only=false"
        )
    saved = checkpoint["hyper_parameters"]
    _refuse(path, "belongs to another architecture", _architecture(saved), _architecture(hyper_parameters))
    # Lightning restores the optimiser with its old values: new ones would be shown, and not used.
    before, now = _prefixed("optimizer", saved), _prefixed("optimizer", hyper_parameters)
    now = {key: value for key, value in now.items() if key in before or value}  # a key that came later, and is off
    _refuse(path, "its optimiser goes on as it was", before, now)


def _refuse(path: str | Path, why: str, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    lines = list(_differences(saved, ours))
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise CheckpointError(f"ckpt_path = {path}: {why}:\n{listed}\nSet them as in the checkpoint, or train anew")


def _prefixed(section: str, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in hyper_parameters[section].items()}


def _architecture(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    lattice = {f"lattice.{name}": hyper_parameters["lattice"].get(name) for name in _LATTICE_SIZE}
    return {"embedding dimension": hyper_parameters["dim"], **lattice, **_prefixed("model", hyper_parameters)}


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*saved, *ours]):
        if saved.get(key) != ours.get(key):
            yield f"{key}: {saved.get(key)} in the checkpoint, {ours.get(key)} here"
