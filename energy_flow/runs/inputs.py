"""Inputs of a prediction: from texts, from a file of embeddings, or from a row of the data.

N inputs, D embedding dimension
"""

import re
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from energy_flow.data import EnergyDataModule
from energy_flow.data.gallery import names_of
from energy_flow.data.pairs import read_rows
from energy_flow.data.storage.names import read_source_text
from energy_flow.data.text.encoder import TextEncoder
from energy_flow.errors import ConfigError
from energy_flow.pretrained import ModelCard
from energy_flow.tables import print_text

_PUBLISHER = "sentence-transformers"  # a model's file may name encoders of this publisher only


@dataclass(frozen=True)
class Inputs:
    """Inputs with their labels."""

    source: Tensor  # [N, D]
    labels: list[str]  # [N]
    true: str | None = None  # name of the true target of a single input


def inputs_of_texts(
    texts: list[str], encoder_name: str | None, card: ModelCard, device: torch.device, console: Console
) -> Inputs:
    """Encode texts; `encoder_name` None: with the encoder that the model's card names.

    Raises:
        ConfigError: the encoder is unknown, not trusted, not loadable, or has another embedding dimension.
        DataError: the encoder returns unusable embeddings.
    """
    name = encoder_name or _encoder_of(card)
    encoder = TextEncoder(name, str(device))
    if encoder.dim != card.dim:
        raise ConfigError(
            f"encoder = {name}: its embeddings have dimension {encoder.dim}, the model takes {card.dim}. Give the "
            f"encoder of the training data{f', {card.encoder}' if card.encoder else ''}"
        )
    if cut := encoder.num_cut(texts):
        print_text(console, f"{cut} of the texts are longer than the encoder reads: their ends are ignored")
    return Inputs(torch.from_numpy(encoder.encode(texts)), texts)


def inputs_of_file(path: str, card: ModelCard) -> Inputs:
    """Read the sources of a file.

    Raises:
        ConfigError: the file has another embedding dimension than the model.
        DataError: the file is unusable.
    """
    source, names = read_rows(path, "source", card.normalize, "input")
    _check_dim(f"input = {path}", source.shape[1], card)
    return Inputs(source, names or [f"row {row}" for row in range(len(source))])


def input_of_split(split: str, row: int, data: EnergyDataModule, card: ModelCard) -> Inputs:
    """Take one row of a split, with the name of its true target."""
    if split not in data.splits():
        raise ConfigError(f"split = {split}: data.{split} is null. Give data.{split}=PATH, or another split")
    dataset = data.splits()[split]
    if row >= len(dataset):
        raise ConfigError(f"row = {row}: data.{split} has the rows 0 to {len(dataset) - 1:,}")
    _check_dim(f"data.{split}", dataset.dim, card)
    text = read_source_text(dataset.files[::-1], row)
    label = f"row {row} of {split}" + (f": {text}" if text else "")
    return Inputs(dataset[row]["source"].unsqueeze(0), [label], names_of(split, dataset)[row])


def _check_dim(where: str, dim: int, card: ModelCard) -> None:
    if dim != card.dim:
        raise ConfigError(
            f"{where}: embeddings of dimension {dim}, but the model takes {card.dim}. Give rows from the encoder of "
            "the training data"
        )


def _encoder_of(card: ModelCard) -> str:
    """The encoder that a model's card names; a known publisher only, because encoders have weights and code."""
    name = card.encoder
    if name is None:
        raise ConfigError(
            "encoder = null: the model does not name the encoder of its training data. Give encoder=NAME, a "
            "sentence-transformers model"
        )
    if not re.fullmatch(rf"{_PUBLISHER}/[\w-][\w.-]*", name):
        raise ConfigError(
            f"encoder = null: the model names {name!r}, which is not from {_PUBLISHER}/. An encoder has files of its "
            f"own, which may run code. If you trust it, give encoder={name}"
        )
    return name
