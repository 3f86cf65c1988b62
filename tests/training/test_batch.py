"""Which further entries of a batch reach a neuron: tensors with one row per sample."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.errors import ConfigError
from energy_flow.training.batch import context_for
from tests.training.test_module import DIM, make_loader, make_module, make_trainer


class Sensing(nn.Module):
    """Keeps the names of the context of every batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[list[str]] = []

    def sense(self, surface: Tensor, context: dict[str, Tensor]) -> Tensor:
        self.seen.append(sorted(context))
        return surface

    def forward(self, position: Tensor, energy: Tensor, sensed: Tensor) -> Any:
        return self.inner(position, energy)


class WithClasses(nn.Module):
    """A loader of batches of 8, the last of 4, that have `classes` [8], whatever their size, and a `weight` [B]."""

    def __iter__(self) -> Any:
        for batch in make_loader(12):
            yield {**batch, "classes": torch.arange(8), "weight": batch["source"][:, 0], "name": "x"}


def test_a_neuron_never_loses_a_tensor_in_a_smaller_batch() -> None:
    """By its length alone, a tensor of 8 classes would be context in batches of 8 samples only."""
    module = make_module("model.neuron=null")
    module.processor.neuron = neuron = Sensing(module.processor.neuron)
    trainer = make_trainer(max_epochs=1, limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"batch entry 'classes' has shape \[8\], in a batch of 4 samples"):
        trainer.fit(module, WithClasses())
    assert neuron.seen == [["classes", "weight"]]


def test_other_neurons_take_no_context() -> None:
    entries = {
        "source": torch.ones(4, DIM),
        "classes": torch.arange(8),
        "weight": torch.ones(4),
        "share": torch.ones(()),
    }
    assert list(context_for(SimpleNeuron(2, 3), entries, 4)) == ["weight"]
    del entries["classes"]
    assert list(context_for(Sensing(SimpleNeuron(2, 3)), entries, 4)) == ["weight"]
