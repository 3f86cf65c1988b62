"""A trained flow lattice as a plain `nn.Module`: no Lightning, no Hydra."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from energy_flow import targets
from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.core.faults import FaultQueue
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import CheckpointError, ConfigError, DataError
from energy_flow.pretrained.card import FORMAT, ModelCard, read_model, write_model
from energy_flow.settings import read
from energy_flow.version import __version__

SHIPPED = Path(__file__).parent / "reverse_dictionary.safetensors"

# `data.name` -> the text encoder of these embeddings.
_ENCODERS = {"reverse_dictionary": "sentence-transformers/all-mpnet-base-v2"}


class EnergyFlowModel(nn.Module):
    """A trained flow lattice that maps embeddings to embeddings.

    Args:
        card: the description of the model. The initial weights are random.

    Attributes:
        card: as given.
        processor: the flow lattice. Call it to get surfaces, landings and statistics as well.
    """

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.card = card
        self.processor = FlowProcessor(card.dim, card.lattice, card.model, card.seed)
        self._faults = FaultQueue(card.lattice.capacity)

    @classmethod
    def from_pretrained(cls, path: str | Path = SHIPPED) -> Self:
        """Load a file of `save_pretrained`, on the CPU, in float32 and evaluation mode.

        Args:
            path: the file. Default: the model in the package, trained on the reverse dictionary.

        Raises:
            CheckpointError: the file is missing or corrupt, has a newer format, or its weights don't fit the model.
        """
        path = Path(path).expanduser()
        return cls._with_weights(*read_model(path), path)

    @classmethod
    def from_checkpoint(cls, path: str | Path, encoder: str | None = None) -> Self:
        """Load a training checkpoint, on the CPU, in float32 and evaluation mode.

        Args:
            path: for example `best.ckpt`.
            encoder: the text encoder of the embeddings. None: that of the data set, if it is one of energy_flow's.

        Raises:
            CheckpointError: the file is missing or corrupt, energy_flow didn't write it, or its weights don't fit.
        """
        checkpoint = checkpoints.load(path)
        prefix = "processor."  # its name in the LightningModule; a learnt temperature is left out
        saved = checkpoint["state_dict"].items()
        weights = {name.removeprefix(prefix): value for name, value in saved if name.startswith(prefix)}
        return cls._with_weights(_card_of(checkpoint, path, encoder), weights, path)

    def save_pretrained(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write weights and card as one safetensors file.

        Args:
            path: the file, in an existing folder. An existing file is replaced.
            dtype: of the weights in the file. float16 halves the size and rounds the weights: to measure the rounded
                weights, call `model.half().float()` first.
            metrics: results of these weights, for the card. None: keep those of the card.

        Raises:
            CheckpointError: a weight is not finite in `dtype`, or the path can't be written.
        """
        path = Path(path).expanduser()
        changes = {"format_version": FORMAT, "version": __version__}
        card = self.card.model_dump() | changes | ({} if metrics is None else {"metrics": dict(metrics)})
        weights = {
            name: value.to("cpu", dtype if value.is_floating_point() else None).contiguous()
            for name, value in self.processor.state_dict().items()
        }
        write_model(path, read(ModelCard, card, ""), weights)

    def forward(self, source: Tensor) -> Tensor:
        """Compute the output embeddings of one source embedding or of a batch. They are not normalised.

        Args:
            source: [B, D] or [D], floats. If the model needs rows of length 1, they are normalised first.

        Returns:
            [B, D] or [D].

        Raises:
            ConfigError: another shape.
            DataError: a row has NaN or Inf, or it is zero and can't be normalised.
            NoLandingError, NotFiniteError: there is no valid output; names the rows.
        """
        rows = source.unsqueeze(0) if source.ndim == 1 else source
        output = self.processor(self._prepared(rows) if rows.ndim == 2 else rows)
        self._faults.put(output.faults)
        self._faults.raise_all()
        embedding: Tensor = output.embedding
        return embedding[0] if source.ndim == 1 else embedding

    def _prepared(self, rows: Tensor) -> Tensor:
        """Prepare rows as in training."""
        exact = rows.double()  # in float64 the square of any float32 value neither overflows nor vanishes
        length = exact.norm(dim=1, keepdim=True)
        unfit = ~length.isfinite() | ((length == 0) & self.card.normalize)
        if unfit.any():
            index = unfit.nonzero()[:, 0].tolist()
            raise DataError(
                f"source row {index[0]} of {len(rows)} holds nothing but zeros, NaN or Inf; {len(index)} of them do: "
                "mend or remove them"
            )
        return (exact / length if self.card.normalize else exact).to(self.processor.dtype)

    @classmethod
    def _with_weights(cls, card: ModelCard, weights: Mapping[str, Tensor], path: str | Path) -> Self:
        described = {"lattice": card.lattice.model_dump(), "model": card.model.model_dump()}
        compatibility.check_depth(described, weights, path)
        try:
            with targets.from_file(), torch.device("meta"):  # allocates no memory: wrong sizes may be huge
                compatibility.check_weights(weights, cls(card).processor, path)
        except (ConfigError, RuntimeError, TypeError, OverflowError) as error:
            reason = targets.one_line(error)[:600]  # a value in a file may be long
            raise CheckpointError(f"ckpt_path = {path}: its card describes no model: {reason}") from error
        with targets.from_file():
            model = cls(card)
        model.processor.load_state_dict(weights)
        return model.eval()


def _card_of(checkpoint: Mapping[str, Any], path: str | Path, encoder: str | None) -> ModelCard:
    """The card of the model in a training checkpoint."""
    saved = checkpoint["hyper_parameters"]
    config, fingerprint = checkpoints.origin(checkpoint)
    # Without a config, the rows came from a custom loader that prepared them.
    data = (config or {}).get("data", {})
    described = {
        "format_version": FORMAT,
        "version": __version__,
        **{name: saved[name] for name in ("dim", "lattice", "model", "seed")},
        "encoder": encoder or _ENCODERS.get(data.get("name")),
        "normalize": data.get("normalize", False),
        "metrics": {},
        "data_fingerprint": fingerprint,
    }
    try:
        return read(ModelCard, described, "")
    except ConfigError as error:
        raise CheckpointError(f"ckpt_path = {path}: its hyper_parameters describe no model: {error}") from error
