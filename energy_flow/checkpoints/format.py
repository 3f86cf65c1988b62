"""The format of a checkpoint: its schema, and how it is read and verified."""

import errno
import importlib.metadata
import platform
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from energy_flow.checkpoints.archive import read_archive
from energy_flow.errors import CheckpointError
from energy_flow.version import __version__

# Errors of the system around a file, not of its bytes.
_UNREADABLE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE}
KEY = "energy_flow"  # our own section of a checkpoint, see `Provenance`
Count = Annotated[int, Field(ge=0)]
Dimension = Annotated[int, Field(ge=1)]
Section = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class RunConfig(_Part):
    """The part of a run's config that is read from its checkpoints; the whole config is saved."""

    data: Section = {}


class Provenance(_Part):
    """Where a checkpoint comes from."""

    config: RunConfig | None
    embedding_dim: Dimension
    data_fingerprint: dict[str, str]  # split -> digest
    versions: dict[str, str] = {}


class HyperParameters(_Part):
    """The arguments of `EnergyFlowModule` that describe a model; a test holds the two together."""

    dim: Dimension
    lattice: Section
    model: Section
    loss: Section
    optimizer: Section
    seed: Count


class Contents(_Part):
    """A whole checkpoint. Lightning's sections have defaults: they are missing where weights alone were saved."""

    lightning_version: Annotated[str, Field(alias="pytorch-lightning_version", pattern=r"^2\.\d+(\.\w+)*$")]
    energy_flow: Provenance
    hyper_parameters: HyperParameters
    state_dict: dict[str, Tensor]
    current_model_state: dict[str, Tensor] = {}  # the trained weights where `state_dict` holds averages
    global_step: Count = 0  # optimiser steps
    optimizer_states: list[Section] = []
    lr_schedulers: list[Section] = []
    loops: Section = {}
    callbacks: dict[str, Section] = {}


def provenance(config: dict[str, Any] | None, dim: int, fingerprint: dict[str, str]) -> dict[str, Any]:
    """The section `Provenance` of a new checkpoint: config of the run, embedding dimension, split -> digest."""
    versions = {
        "energy_flow": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": importlib.metadata.version("lightning"),
    }
    return {"config": config, "embedding_dim": dim, "data_fingerprint": fingerprint, "versions": versions}


def origin(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Config and data fingerprint of the run that wrote a checkpoint."""
    info = checkpoint[KEY]
    return info["config"], dict(info["data_fingerprint"])


class CorruptCheckpointError(CheckpointError):
    """The bytes of a file are not those of a checkpoint; the message is the reason alone."""


def load(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint; nothing in it can run code.

    Raises:
        CheckpointError: missing, corrupt, or not written by energy_flow. Of a corrupt file it names valid siblings.
    """
    path = Path(path).expanduser()
    try:
        return load_without_siblings(path)
    except CorruptCheckpointError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: CorruptCheckpointError) -> CheckpointError:
    """The error of a corrupt checkpoint for the user: with its path, and the valid checkpoints in its folder."""
    valid = ", ".join(other.name for other in siblings(path) if other != path and corruption(other) is None)
    remedy = f"Valid ones in its folder: {valid}" if valid else "There is no valid one in its folder"
    return CheckpointError(f"ckpt_path = {path}: refused: corrupt, or no checkpoint ({error}). {remedy}")


def read_step(path: Path) -> int:
    """The optimiser steps before a checkpoint, which is verified without loading a tensor."""
    return int(load_without_siblings(path, outline=True).get("global_step", 0))


def load_without_siblings(path: Path, *, outline: bool = False) -> dict[str, Any]:
    """Read and verify a checkpoint as `load` does, but look at no other file; an outline has tensors on `meta`.

    Raises:
        CorruptCheckpointError: the bytes are not those of a checkpoint.
        CheckpointError: missing, or not written by energy_flow.
    """
    if path.is_dir():
        raise CheckpointError(f"ckpt_path = {path}: is a folder; give a checkpoint in it, such as best.ckpt")
    if not path.is_file():
        raise CheckpointError(f"ckpt_path = {path}: there is no such file")
    checkpoint: dict[str, Any] = _read_bytes(path, outline=outline)
    try:
        Contents.model_validate(checkpoint)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        wrong = f"{'.'.join(map(str, detail['loc'])) or 'its contents'}: {detail['msg']}"
        raise CheckpointError(f"ckpt_path = {path}: not a checkpoint of energy_flow ({wrong})") from error
    _refuse_tricks(checkpoint, path)
    return checkpoint


def _refuse_tricks(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse entries that no run writes and Lightning would follow: names of code to build, paths out of a folder."""
    code = [name for name in checkpoint["hyper_parameters"] if name.startswith("_")]
    if code:
        raise CheckpointError(
            f"ckpt_path = {path}: hyper_parameters.{code[0]}: a checkpoint may not name code to build"
        )
    outside = [text for text in _texts(checkpoint.get("callbacks")) if ".." in Path(text).parts]
    if outside:
        raise CheckpointError(f"ckpt_path = {path}: callbacks: the path {outside[0]!r} leaves its folder")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _texts(part)


def load_weights(path: Path) -> dict[str, Any]:
    """Read and verify a plain `state_dict` without the other parts of a checkpoint."""
    return dict(_read_bytes(path))


def siblings(path: Path) -> list[Path]:
    """All checkpoints in the folder of a file, in the order to resume from: last*.ckpt before others, newest first."""

    def order(found: Path) -> tuple[bool, float]:
        return found.name.startswith("last"), found.stat().st_mtime

    return sorted(path.parent.glob("*.ckpt"), key=order, reverse=True)


def corruption(path: Path) -> str | None:
    """Why the bytes of a file are not those of a checkpoint; None where they are."""
    try:
        _read_bytes(path)
    except CorruptCheckpointError as error:
        return str(error)
    return None


def _read_bytes(path: Path, *, outline: bool = False) -> Any:
    try:
        return read_archive(path, outline=outline)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _UNREADABLE:  # the bytes may be fine: another checkpoint must not take its place
            raise CheckpointError(
                f"{path}: can't be read: {error.strerror}. Make it readable, and try again"
            ) from error
        raise CorruptCheckpointError(_reason(error)) from error
    except Exception as error:  # of any type: zip and unpickler run on corrupt bytes
        raise CorruptCheckpointError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointError | RuntimeError | OSError | zipfile.BadZipFile):
        return str(error).strip().split("\n")[0][:200]
    return "not made of tensors and plain containers"  # the unpickler's messages are no help, or advise to run code
