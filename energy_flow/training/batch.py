"""The forms of a batch: a dict with `source`, `target`, `row` and further entries, or a pair (source, target)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from energy_flow.core.parts import SensingNeuron
from energy_flow.errors import ConfigError

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor] | list[Tensor]


@dataclass(frozen=True)
class UnpackedBatch:
    """The parts of a batch of B samples."""

    source: Tensor  # [B, D]
    target: Tensor  # [B, D]
    rows: Tensor | None  # int64 [B]
    others: dict[str, Any] = field(default_factory=dict)  # all further entries

    @property
    def context(self) -> dict[str, Tensor]:
        """The further entries that are tensors [B, ...]."""
        return _of_samples(self.others, len(self.source))

    def context_for(self, neuron: Any) -> dict[str, Tensor]:
        """The context of this batch for a neuron, see `context_for`."""
        return context_for(neuron, self.others, len(self.source))

    def entries(self) -> dict[str, Any]:
        """All entries by name, for loss terms of one's own."""
        row = {} if self.rows is None else {"row": self.rows}
        return {"source": self.source, "target": self.target, **row, **self.others}


def unpack_batch(batch: Batch, dtype: torch.dtype) -> UnpackedBatch:
    """Name the parts of a batch. Its floating-point numbers get the model's `dtype`: loaders often give float64.

    Raises:
        ConfigError: the batch has another form.
    """
    if isinstance(batch, Mapping) and {"source", "target"} <= batch.keys():
        others = {name: convert(value, dtype) for name, value in batch.items() if name not in _NAMED}
        return UnpackedBatch(batch["source"].to(dtype), batch["target"].to(dtype), batch.get("row"), others)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return UnpackedBatch(batch[0].to(dtype), batch[1].to(dtype), None)
    content = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f" of {len(batch)}"
    raise ConfigError(
        f"a batch is a {type(batch).__name__}{content}: give a dict with 'source' and 'target' (and 'row'), "
        "or a pair (source, target)"
    )


_NAMED = ("source", "target", "row")


def context_for(neuron: Any, entries: Mapping[str, Any], num_samples: int) -> dict[str, Tensor]:
    """The entries other than source, target and row that are tensors [num_samples, ...], for the method `sense`.

    Raises:
        ConfigError: the neuron has this method, and a tensor has another length. In a batch of just this length the
            neuron would get it.
    """
    context = _of_samples(entries, num_samples)
    if isinstance(neuron, SensingNeuron):
        for name, value in entries.items():
            if name not in _NAMED and name not in context and isinstance(value, Tensor) and value.ndim > 0:
                raise ConfigError(
                    f"batch entry {name!r} has shape {list(value.shape)}, in a batch of {num_samples} samples: "
                    "model.neuron has a method sense, which gets all tensors of a batch, so each must have one row per "
                    "sample. Give the entry such rows, or keep it outside of the batch, such as in a buffer"
                )
    return context


def _of_samples(entries: Mapping[str, Any], num_samples: int) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in entries.items()
        if name not in _NAMED and isinstance(value, Tensor) and value.ndim > 0 and len(value) == num_samples
    }


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in `dtype`; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
