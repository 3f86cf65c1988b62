"""The nearest words of an input: python -m energy_flow.predict text=... | row=... | input=... [key=value ...]"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from torch import Tensor

from energy_flow.atomic import write_whole
from energy_flow.data import EnergyDataModule
from energy_flow.data.gallery import Gallery, names_of
from energy_flow.data.storage.names import read_source_text
from energy_flow.data.storage.rows import Rows
from energy_flow.data.text.encoder import TextEncoder
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.metrics.retrieval import nearest, ranks
from energy_flow.pretrained import SHIPPED, EnergyFlowModel
from energy_flow.runs.application import application
from energy_flow.runs.checks import check_normalisation
from energy_flow.runs.settings import find_device
from energy_flow.settings import PathSettings, Settings, read

_SHOWN = 5  # inputs of a file
_PUBLISHER = "sentence-transformers"  # whose encoders a model's file may name

Words = Annotated[str, Field(pattern=r"\S")]


class PredictSettings(Settings):
    """The whole config of a prediction."""

    task_name: str
    seed: int
    ckpt_path: str | None
    text: Words | Annotated[list[Words], Field(min_length=1)] | None
    row: Annotated[int, Field(ge=0)] | None
    split: Literal["train", "val", "test"]
    input: str | None
    gallery: str | None
    encoder: str | None
    k: Annotated[int, Field(ge=1)]
    device: Literal["auto", "cpu", "cuda"]
    data: dict[str, Any]
    paths: PathSettings

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = [name for name in ("text", "row", "input") if getattr(self, name) is not None]
        if not given:
            raise ValueError('text, row and input are null: give one of them, such as text="it measures earthquakes"')
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: an input is one of them; leave out the others")
        return self


@dataclass(frozen=True)
class Inputs:
    """What is asked: N rows."""

    source: Tensor  # [N, D]
    labels: list[str]
    true: str | None = None  # the name that the one row should find


def predict(config: dict[str, Any]) -> None:
    """One prediction from its config to its table or files."""
    settings = read(PredictSettings, config, "")
    console, device = Console(), find_device(settings.device)
    model = load_model(settings.ckpt_path)
    data = EnergyDataModule.from_config(config)
    if settings.row is not None:
        check_normalisation(model.card.normalize, data)
    if settings.row is not None or settings.gallery is None:
        data.setup()
    gallery = Gallery.from_splits(data.splits()) if settings.gallery is None else Gallery.from_file(settings.gallery)
    _check_gallery(settings, model, gallery)
    inputs = _inputs(settings, model, data, device, console)
    embedding = _embed(model.to(device), inputs.source, data.settings.eval_batch_size, console)
    score, index = nearest(embedding, gallery.target, settings.k)
    if settings.input is None:
        _show(console, inputs, gallery, score, index)
        if inputs.true is not None:
            _say(console, _place(inputs.true, embedding, gallery))
        return
    _write(Path(settings.paths.output_dir), inputs, embedding, gallery, score, index)
    _show(console, inputs, gallery, score[:_SHOWN], index[:_SHOWN])
    _say(console, f"{len(inputs.labels):,} inputs, all of them in predictions.safetensors and neighbours.jsonl")
    _say(console, f"run folder: {settings.paths.output_dir}")


def load_model(ckpt_path: str | None) -> EnergyFlowModel:
    """The model of a .ckpt or .safetensors; None: the one that comes with the package.

    Raises:
        CheckpointError: it isn't there, or can't be used.
    """
    if ckpt_path is None:
        if not SHIPPED.is_file():
            raise CheckpointError(
                f"ckpt_path = null: the weights that come with the package aren't there ({SHIPPED}). Train some: "
                "python -m energy_flow.train, then ckpt_path=logs/train/runs/.../checkpoints/best.ckpt"
            )
        return EnergyFlowModel.from_pretrained(SHIPPED)
    if Path(ckpt_path).suffix == ".safetensors":
        return EnergyFlowModel.from_pretrained(ckpt_path)
    return EnergyFlowModel.from_checkpoint(ckpt_path)


def _check_gallery(settings: PredictSettings, model: EnergyFlowModel, gallery: Gallery) -> None:
    size, dim = gallery.target.shape
    if dim != model.card.dim:
        raise ConfigError(
            f"gallery = {settings.gallery or 'null: the data'}: candidates of dimension {dim}, the model gives "
            f"{model.card.dim}. Give targets made with the same encoder as the training data"
        )
    if settings.k > size:
        raise ConfigError(f"k = {settings.k}: there are {size:,} candidates. Set k={size} or less")


def _inputs(
    settings: PredictSettings, model: EnergyFlowModel, data: EnergyDataModule, device: torch.device, console: Console
) -> Inputs:
    if settings.text is not None:
        texts = [settings.text] if isinstance(settings.text, str) else settings.text
        return Inputs(_encoded(texts, settings.encoder, model, device, console), texts)
    if settings.input is not None:
        rows = Rows(settings.input, "source", model.card.normalize, "input")
        _check_source(f"input = {settings.input}", rows.dim, model)
        return Inputs(rows.all(), rows.names or [f"row {row}" for row in range(len(rows))])
    return _of_split(settings, model, data)


def _of_split(settings: PredictSettings, model: EnergyFlowModel, data: EnergyDataModule) -> Inputs:
    row, split = settings.row, settings.split
    assert row is not None
    if split not in data.splits():
        raise ConfigError(f"split = {split}: data.{split} is null. Give data.{split}=PATH, or another split")
    dataset = data.splits()[split]
    if row >= len(dataset):
        raise ConfigError(f"row = {row}: data.{split} has the rows 0 to {len(dataset) - 1:,}")
    _check_source(f"data.{split}", dataset.dim, model)
    text = read_source_text(dataset.files[::-1], row)
    label = f"row {row} of {split}" + (f": {text}" if text else "")
    return Inputs(dataset[row]["source"].unsqueeze(0), [label], names_of(split, dataset)[row])


def _check_source(what: str, dim: int, model: EnergyFlowModel) -> None:
    if dim != model.card.dim:
        raise ConfigError(
            f"{what}: embeddings of dimension {dim}, the model takes {model.card.dim}. Give rows made with the same "
            "encoder as the training data"
        )


def _encoded(
    texts: list[str], name: str | None, model: EnergyFlowModel, device: torch.device, console: Console
) -> Tensor:
    name = name or _named_encoder(model)
    encoder = TextEncoder(name, str(device))
    if encoder.dim != model.card.dim:
        raise ConfigError(
            f"encoder = {name}: gives embeddings of dimension {encoder.dim}, the model takes {model.card.dim}. Give "
            f"the encoder of the training data{f', {model.card.encoder}' if model.card.encoder else ''}"
        )
    if cut := encoder.num_cut(texts):
        _say(console, f"{cut} of the texts are longer than the encoder reads: their ends are left out")
    return torch.from_numpy(encoder.encode(texts))


def _named_encoder(model: EnergyFlowModel) -> str:
    """The encoder that a model's file names: of a known publisher, as an encoder brings weights and code of its own."""
    name = model.card.encoder
    if name is None:
        raise ConfigError(
            "encoder = null: the model doesn't say what made the embeddings that it was trained with. Give "
            "encoder=NAME, the sentence-transformers model that did"
        )
    if not re.fullmatch(rf"{_PUBLISHER}/[\w-][\w.-]*", name):
        raise ConfigError(
            f"encoder = null: the model names {name!r}, which isn't one of {_PUBLISHER}/. An encoder brings files of "
            f"its own: if you trust it, give it yourself, encoder={name}"
        )
    return name


@torch.no_grad()
def _embed(model: EnergyFlowModel, source: Tensor, batch_size: int, console: Console) -> Tensor:
    """Output embeddings, float32 [N, D], on the CPU."""
    device = model.processor.optimizer_step.device
    blocks = source.split(batch_size)
    watched = track(blocks, "predicting", console=console, transient=True) if len(blocks) > 1 else blocks
    return torch.cat([model(block.to(device)).cpu() for block in watched])


def _say(console: Console, what: str) -> None:
    console.print(what, highlight=False, markup=False, soft_wrap=True)


def _show(console: Console, inputs: Inputs, gallery: Gallery, score: Tensor, index: Tensor) -> None:
    """A table per input, of the first ones that there are scores of; the true name is marked."""
    for label, scores, found in zip(inputs.labels, score.tolist(), index.tolist(), strict=False):
        console.print(Text(label, style="bold"), soft_wrap=True)
        table = Table()
        table.add_column("", justify="right")
        table.add_column("word")
        table.add_column("cosine", justify="right")
        for place, (value, candidate) in enumerate(zip(scores, found, strict=True), 1):
            name = gallery.names[candidate]
            table.add_row(str(place), Text(f"{name}  <- the true one" if name == inputs.true else name), f"{value:.4f}")
        console.print(table)


def _place(true: str, embedding: Tensor, gallery: Gallery) -> str:
    candidates = gallery.find(true)
    if not candidates:
        return f"true word: {true}, which is not among the {len(gallery.names):,} candidates"
    gold = torch.tensor(candidates)
    rank = ranks(embedding.expand(len(gold), -1), gallery.target, gold).min().item()
    return f"true word: {true}, rank {rank:g} of {len(gallery.names):,}"


def _write(folder: Path, inputs: Inputs, embedding: Tensor, gallery: Gallery, score: Tensor, index: Tensor) -> None:
    """`predictions.safetensors`: embedding [N, D], neighbour_row and score [N, k]; `neighbours.jsonl`: a line a row."""
    row = gallery.row[index]
    arrays = {"embedding": embedding.contiguous(), "neighbour_row": row, "score": score}
    lines = []
    for number, (label, scores, found, rows) in enumerate(
        zip(inputs.labels, score.tolist(), index.tolist(), row.tolist(), strict=True)
    ):
        neighbours = [
            {"name": gallery.names[candidate], "row": at, "score": value}
            for candidate, at, value in zip(found, rows, scores, strict=True)
        ]
        lines.append(json.dumps({"row": number, "name": label, "neighbours": neighbours}, ensure_ascii=False))
    write_whole(folder / "predictions.safetensors", save(arrays))
    write_whole(folder / "neighbours.jsonl", ("\n".join(lines) + "\n").encode())


@application("predict")
def _main(config: dict[str, Any]) -> None:
    predict(config)


def main() -> None:
    """Entry point."""
    sys.argv[1:] = [_literal(word) for word in sys.argv[1:]]
    _main()


def _literal(word: str) -> str:
    """`text=...` may hold any character, also those that Hydra's grammar knows; lists and what is quoted stay."""
    key, _, value = word.partition("=")
    if key != "text" or value in ("", "null") or value[0] in "[\"'":
        return word
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # for OmegaConf, which reads ${...} as a reference
    return f"text={QuotedString(value, Quote.double).with_quotes()}"


if __name__ == "__main__":
    main()
