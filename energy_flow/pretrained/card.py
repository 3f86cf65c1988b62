"""The file format of a model: weights as safetensors, and a model card in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from energy_flow.atomic import atomic_write, digest
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.networks import ModelSettings
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.settings import Settings, read
from energy_flow.version import __version__

FORMAT = 1
_CARD, _DIGEST = "energy_flow", "sha256"  # keys of the metadata
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


class ModelCard(Settings):
    """The description of a model in its file.

    Attributes:
        format_version: of the file.
        version: of the energy_flow that wrote the file.
        dim: D, the dimension of input and output embeddings.
        lattice, model: the config sections of these names.
        seed: of the exploration noise and of the run.
        encoder: the text encoder of the embeddings; None: unknown.
        normalize: whether input rows must have length 1.
        metrics: results of these weights by name: `test/mrr`, ...
        data_fingerprint: sha256 of every split of the training data.
    """

    format_version: Literal[1]
    version: str
    dim: Annotated[int, Field(ge=1)]
    lattice: LatticeSettings
    model: ModelSettings
    seed: Annotated[int, Field(ge=0)]
    encoder: str | None
    normalize: bool
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    data_fingerprint: dict[str, str]


def write_model(path: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write a file for `read_model`, completely or not at all.

    Raises:
        CheckpointError: a weight is not finite, or the path can't be written.
    """
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: {bad[0]} holds NaN or Inf as {weights[bad[0]].dtype}: nothing was written. If training didn't "
            "diverge, choose a wider dtype"
        )
    text = card.model_dump_json()
    try:
        atomic_write(path, save(dict(weights), {_CARD: text, _DIGEST: digest(text, weights)}))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}). Give another path") from error


def read_model(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """Read the card and the weights of a file. The file can't run code.

    Raises:
        CheckpointError: the file is missing or corrupt, has a newer format, or energy_flow didn't write it.
    """
    try:
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"ckpt_path = {path}: {error}") from error


def _read(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError("is a folder; give the file in it" if path.is_dir() else "there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _CARD not in metadata:
                raise CheckpointError(
                    f"not a model of energy_flow: no {_CARD!r} in its metadata. Give a .safetensors that "
                    "save_pretrained wrote, or a .ckpt"
                )
            described = _described(metadata[_CARD])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"damaged, or no safetensors file ({error}). Fetch it anew") from error
    if metadata.get(_DIGEST) != digest(metadata[_CARD], weights):
        raise CheckpointError("damaged: its content has another sha256 than it says. Fetch it anew")
    _check_dtypes(weights)
    return _card(described), weights


def _described(text: str) -> dict[str, Any]:
    """Parse the card and check its format version."""
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: its card isn't JSON ({error}). Fetch it anew") from error
    version = described.get("format_version") if isinstance(described, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"has format_version {version}, energy_flow {__version__} reads {FORMAT}. Update energy_flow"
        )
    if version != FORMAT:
        raise CheckpointError(f"damaged: its card has format_version {version!r}, not {FORMAT}. Fetch it anew")
    return described


def _card(described: dict[str, Any]) -> ModelCard:
    try:
        return read(ModelCard, described, "")
    except ConfigError as error:
        raise CheckpointError(
            f"written by energy_flow {described.get('version')}; {__version__} doesn't understand its card. "
            f"Update energy_flow, or write the file anew:\n{error}"
        ) from error


def _check_dtypes(weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise CheckpointError(f"{name} is {value.dtype}; weights are {known}. Write it anew")
