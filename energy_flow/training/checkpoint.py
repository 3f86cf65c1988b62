"""What a checkpoint says of itself, and whether it fits."""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from energy_flow.errors import CheckpointError
from energy_flow.version import __version__

KEY = "energy_flow"
# What every checkpoint of ours holds, and what is read of it.
_PARTS = {
    KEY: ("config", "embedding_dim", "data_fingerprint"),
    "hyper_parameters": ("dim", "lattice", "model"),
    "state_dict": (),
}
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


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it can run code.

    Raises:
        CheckpointError: missing, damaged, or not written by energy_flow.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"ckpt_path = {path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"ckpt_path = {path}: damaged, or no checkpoint ({reason}). Give another one, such as last.ckpt beside it"
        ) from error
    if not all(_has(checkpoint, part, names) for part, names in _PARTS.items()):
        raise CheckpointError(f"ckpt_path = {path}: not a checkpoint of energy_flow")
    return checkpoint


def _has(checkpoint: Any, part: str, names: tuple[str, ...]) -> bool:
    found = checkpoint.get(part) if isinstance(checkpoint, dict) else None
    return isinstance(found, dict) and all(name in found for name in names)


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
    _refuse(
        path, "its optimiser goes on as it was", _prefixed("optimizer", saved), _prefixed("optimizer", hyper_parameters)
    )


def _refuse(path: str | Path, why: str, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    lines = list(_differences(saved, ours))
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise CheckpointError(f"ckpt_path = {path}: {why}:\n{listed}")


def _prefixed(section: str, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in hyper_parameters[section].items()}


def _architecture(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    lattice = {f"lattice.{name}": hyper_parameters["lattice"].get(name) for name in _LATTICE_SIZE}
    return {"embedding dimension": hyper_parameters["dim"], **lattice, **_prefixed("model", hyper_parameters)}


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*saved, *ours]):
        if saved.get(key) != ours.get(key):
            yield f"{key}: {saved.get(key)} in the checkpoint, {ours.get(key)} here"
