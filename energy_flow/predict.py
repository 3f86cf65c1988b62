"""Find the nearest words of inputs: python -m energy_flow.predict text=... | row=... | input=... [key=value ...]"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import track
from rich.text import Text
from safetensors.torch import save
from torch import Tensor

from energy_flow.atomic import atomic_write
from energy_flow.data import EnergyDataModule
from energy_flow.data.gallery import Gallery
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.metrics.retrieval import nearest, ranks
from energy_flow.pretrained import SHIPPED, EnergyFlowModel
from energy_flow.runs.application import application
from energy_flow.runs.checks import check_normalisation
from energy_flow.runs.inputs import Inputs, input_of_split, inputs_of_file, inputs_of_texts
from energy_flow.runs.settings import find_device
from energy_flow.settings import ProgramSettings, read
from energy_flow.tables import print_text, rich_table

_SHOWN = 5  # inputs of a file on the screen

Words = Annotated[str, Field(pattern=r"\S")]


class PredictSettings(ProgramSettings):
    """The whole config of a prediction."""

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

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = [name for name in ("text", "row", "input") if getattr(self, name) is not None]
        if not given:
            raise ValueError('text, row and input are null: give one of them, such as text="it measures earthquakes"')
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: only one input is allowed; leave out the others")
        return self


def predict(config: dict[str, Any]) -> None:
    """Find the nearest candidates of all inputs and show them; write files for `input=FILE`."""
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
            print_text(console, _rank_of_true(inputs.true, embedding, gallery))
        return
    _write(Path(settings.paths.output_dir), inputs, embedding, gallery, score, index)
    _show(console, inputs, gallery, score[:_SHOWN], index[:_SHOWN])
    print_text(console, f"all {len(inputs.labels):,} inputs: see predictions.safetensors and neighbours.jsonl")
    print_text(console, f"run folder: {settings.paths.output_dir}")


def load_model(ckpt_path: str | None) -> EnergyFlowModel:
    """Load the model of a .ckpt or .safetensors; None: the model that the package ships."""
    if ckpt_path is None:
        if not SHIPPED.is_file():
            raise CheckpointError(
                f"ckpt_path = null: the weights of the package are missing ({SHIPPED}). Train a model: "
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
            f"gallery = {settings.gallery or 'null: the data'}: candidates of dimension {dim}, but the model predicts "
            f"{model.card.dim}. Give targets from the encoder of the training data"
        )
    if settings.k > size:
        raise ConfigError(f"k = {settings.k}: there are {size:,} candidates. Set k={size} or less")


def _inputs(
    settings: PredictSettings, model: EnergyFlowModel, data: EnergyDataModule, device: torch.device, console: Console
) -> Inputs:
    if settings.text is not None:
        texts = [settings.text] if isinstance(settings.text, str) else settings.text
        return inputs_of_texts(texts, settings.encoder, model.card, device, console)
    if settings.input is not None:
        return inputs_of_file(settings.input, model.card)
    assert settings.row is not None
    return input_of_split(settings.split, settings.row, data, model.card)


@torch.no_grad()
def _embed(model: EnergyFlowModel, source: Tensor, batch_size: int, console: Console) -> Tensor:
    """Output embeddings, float32 [N, D], on the CPU."""
    device = model.processor.optimizer_step.device
    blocks = source.split(batch_size)
    watched = track(blocks, "predicting", console=console, transient=True) if len(blocks) > 1 else blocks
    return torch.cat([model(block.to(device)).cpu() for block in watched])


def _show(console: Console, inputs: Inputs, gallery: Gallery, score: Tensor, index: Tensor) -> None:
    """Print a table for each row of `score`; the true name is marked."""
    for label, scores, found in zip(inputs.labels, score.tolist(), index.tolist(), strict=False):
        console.print(Text(label, style="bold"), soft_wrap=True)
        names = [gallery.names[candidate] for candidate in found]
        rows = [
            [str(place), f"{name}  <- the true one" if name == inputs.true else name, f"{value:.4f}"]
            for place, (name, value) in enumerate(zip(names, scores, strict=True), 1)
        ]
        console.print(rich_table(["", "word", "cosine"], rows, left=["word"], wrap=["word"]))


def _rank_of_true(true: str, embedding: Tensor, gallery: Gallery) -> str:
    candidates = gallery.find(true)
    if not candidates:
        return f"true word: {true}, which is not among the {len(gallery.names):,} candidates"
    gold = torch.tensor(candidates)
    rank = ranks(embedding.expand(len(gold), -1), gallery.target, gold).min().item()
    return f"true word: {true}, rank {rank:g} of {len(gallery.names):,}"


def _write(folder: Path, inputs: Inputs, embedding: Tensor, gallery: Gallery, score: Tensor, index: Tensor) -> None:
    """Write `predictions.safetensors` (embedding [N, D], neighbour_row and score [N, k]) and `neighbours.jsonl`."""
    row = gallery.row[index]
    lines = []
    results = zip(inputs.labels, score.tolist(), index.tolist(), row.tolist(), strict=True)
    for number, (label, scores, found, rows) in enumerate(results):
        neighbours = [
            {"name": gallery.names[candidate], "row": at, "score": value}
            for candidate, at, value in zip(found, rows, scores, strict=True)
        ]
        lines.append(json.dumps({"row": number, "name": label, "neighbours": neighbours}, ensure_ascii=False))
    arrays = {"embedding": embedding.contiguous(), "neighbour_row": row, "score": score}
    atomic_write(folder / "predictions.safetensors", save(arrays))
    atomic_write(folder / "neighbours.jsonl", "\n".join(lines) + "\n")


def main() -> None:
    """Run the program."""
    sys.argv[1:] = [_quoted(word) for word in sys.argv[1:]]
    application("predict")(predict)()


def _quoted(word: str) -> str:
    """Quote the value of `text=...`, so that it may hold characters of Hydra's grammar; lists and quotes stay."""
    key, _, value = word.partition("=")
    if key != "text" or value in ("", "null") or value[0] in "[\"'":
        return word
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf would read ${...} as a reference
    return f"text={QuotedString(value, Quote.double).with_quotes()}"


if __name__ == "__main__":
    main()
