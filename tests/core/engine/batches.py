"""Batches of one lively case in every way of running, and their gradients."""

import dataclasses

import pytest
import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from tests.core.ways import ENGINES, PLAIN
from tests.helpers import DIM, Case

# Flows spawn, and end early on both planes.
CASE = Case(
    {"width": 4, "spawn.enabled": True, "noise.std": 0.1, "max_steps": 4},
    {"num_layers": 2, "energy_dim": 2},
    training=True,
)
TAPES = {name: way for name, way in ENGINES.items() if way != PLAIN}
TOLERANCE = 1e-12  # sums in another order

every_engine = pytest.mark.parametrize("way", ENGINES.values(), ids=list(ENGINES))
every_tape = pytest.mark.parametrize("way", TAPES.values(), ids=list(TAPES))


def embeddings(seed: int, batch: int = 3) -> Tensor:
    return dataclasses.replace(CASE, seed=seed, batch=batch).embedding()


def rows(seed: int, batch: int = 3) -> Tensor:
    return torch.arange(batch) * 7 + 100 * seed


def run(processor: FlowProcessor, seed: int, batch: int = 3) -> tuple[Tensor, FlowOutput]:
    """Run a batch that depends on the seed."""
    embedding = embeddings(seed, batch)
    return embedding, processor(embedding, rows(seed, batch), record_trajectories=True)


def loss_of(output: FlowOutput) -> Tensor:
    """A sum over samples, so that batches add up."""
    weights = torch.linspace(-1, 2, DIM, dtype=output.embedding.dtype)
    return (output.embedding * weights).sum() + output.surface.square().sum()


def parameter_gradients(processor: FlowProcessor) -> dict[str, Tensor]:
    """The gradients of all parameters; removes them from the parameters."""
    found = {}
    for name, parameter in processor.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def step(processor: FlowProcessor, seed: int, batch: int = 3) -> dict[str, Tensor]:
    """Forward and backward; gradients of the parameters and the embedding."""
    embedding, output = run(processor, seed, batch)
    loss_of(output).backward()
    return with_embedding(processor, embedding)


def with_embedding(processor: FlowProcessor, embedding: Tensor) -> dict[str, Tensor]:
    assert embedding.grad is not None
    found, embedding.grad = embedding.grad, None
    return {**parameter_gradients(processor), "embedding": found}
