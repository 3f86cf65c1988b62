"""Batches share one set of buffers. In any order of forward and backward passes, each gets its own values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import ConfigError
from tests.core.engine.batches import (
    CASE,
    TOLERANCE,
    embeddings,
    every_engine,
    every_tape,
    loss_of,
    rows,
    run,
    step,
    with_embedding,
)
from tests.core.ways import PLAIN, assert_same, processor_of


@pytest.fixture(scope="module")
def expected() -> Callable[[int, int], dict[str, Tensor]]:
    """Gradients of a batch that ran alone, by plain autograd."""
    known: dict[tuple[int, int], dict[str, Tensor]] = {}

    def of(seed: int, batch: int = 3) -> dict[str, Tensor]:
        if (seed, batch) not in known:
            known[seed, batch] = step(processor_of(CASE, PLAIN), seed, batch)
        return known[seed, batch]

    return of


def test_things_happen() -> None:
    _, output = run(processor_of(CASE, PLAIN), 0)
    assert output.statistics["spawned"] > 1
    active = output.by_step["active"]
    assert 0 < active[-1] < active.max()


@every_engine
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("batches", [(3, 3), (2, 5), (5, 2)])
def test_two_batches_forward_and_then_backward(
    way: dict[str, Any], order: tuple[int, int], batches: tuple[int, int], expected: Any
) -> None:
    processor = processor_of(CASE, way)
    passes = [run(processor, seed, batch) for seed, batch in enumerate(batches)]
    for seed in order:
        embedding, output = passes[seed]
        loss_of(output).backward()
        assert_same(with_embedding(processor, embedding), expected(seed, batches[seed]), TOLERANCE)


@every_engine
def test_the_same_batch_twice_and_then_backward(way: dict[str, Any], expected: Any) -> None:
    """Two calls with the same values are still two calls."""
    processor = processor_of(CASE, way)
    passes = [run(processor, 0) for _ in range(2)]
    for embedding, output in passes:
        loss_of(output).backward()
        assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)


@every_engine
@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("quietly", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_between_forward_and_backward(
    way: dict[str, Any], batch: int, quietly: Callable[[], Any], expected: Any
) -> None:
    processor = processor_of(CASE, way)
    embedding, output = run(processor, 0)
    with quietly():
        evaluated = processor(embeddings(1, batch).detach(), rows(1, batch))
    assert not evaluated.embedding.requires_grad
    loss_of(output).backward()
    assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)


@every_engine
def test_a_clean_up_between_forward_and_backward(way: dict[str, Any], expected: Any) -> None:
    processor = processor_of(CASE, way)
    step(processor, 1, batch=6)
    processor.cleanup_memory_safe()
    embedding, output = run(processor, 0)
    processor.cleanup_memory_safe()
    loss_of(output).backward()
    assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)


@every_engine
def test_the_optimiser_step_of_the_forward_pass_counts(way: dict[str, Any], expected: Any) -> None:
    """A replay draws the noise of its forward pass, although the optimiser step has changed."""
    processor = processor_of(CASE, way)
    embedding, output = run(processor, 0)
    run(processor, 1)  # takes the buffers
    processor.optimizer_step.fill_(9)
    processor.eval()
    loss_of(output).backward()
    assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)


@every_engine
def test_backward_twice(way: dict[str, Any], expected: Any) -> None:
    processor = processor_of(CASE, way)
    embedding, output = run(processor, 0)
    loss = loss_of(output)
    loss.backward(retain_graph=True)
    assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)
    loss.backward()
    assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_engine
def test_accumulated_batches_are_the_joined_batch(way: dict[str, Any], expected: Any) -> None:
    processor, joined = processor_of(CASE, way), embeddings(0, 5)
    for part in (slice(0, 2), slice(2, 5)):
        loss_of(processor(joined[part], rows(0, 5)[part])).backward()
    assert_same(with_embedding(processor, joined), expected(0, 5), TOLERANCE)


@every_engine
def test_gradients_of_some_outputs_only(way: dict[str, Any]) -> None:
    """Gradients of landed energies alone, and of one sample alone; the other samples get 0."""
    found = []
    for settings in (PLAIN, way):
        processor = processor_of(CASE, settings)
        embedding, output = run(processor, 0)
        of_one = torch.autograd.grad(output.embedding[1].sum(), embedding, retain_graph=True)[0]
        assert (of_one[[0, 2]] == 0).all()
        of_energy = torch.autograd.grad(output.landings.energy.sum(), embedding)[0]
        found.append({"one": of_one, "energy": of_energy})
    assert_same(found[1], found[0], TOLERANCE)


@every_engine
def test_frozen_weights_get_nothing_and_change_nothing(way: dict[str, Any], expected: Any) -> None:
    processor = processor_of(CASE, way)
    for parameter in processor.parameters():
        parameter.requires_grad_(False)
    embedding, output = run(processor, 0)
    loss_of(output).backward()
    assert embedding.grad is not None
    assert_same({"embedding": embedding.grad}, {"embedding": expected(0)["embedding"]}, TOLERANCE)
    assert all(parameter.grad is None for parameter in processor.parameters())


STEP_WEIGHTS = ("neuron", "carrier")


@every_tape
@pytest.mark.parametrize(
    "name", [name for name, _ in CASE.processor().named_parameters() if name.startswith(STEP_WEIGHTS)]
)
def test_weights_changed_before_the_backward_pass_do_not_change_the_gradients(
    way: dict[str, Any], name: str, expected: Any
) -> None:
    """Also biases, of which autograd itself would not need the old values: a replay does.

    The next batch has the new values.
    """
    processor = processor_of(CASE, way)
    embedding, output = run(processor, 0)
    with torch.no_grad():
        processor.get_parameter(name).mul_(0.5)
        processor.get_parameter(name).data = processor.get_parameter(name).data * 3
    loss_of(output).backward()
    assert_same(with_embedding(processor, embedding), expected(0), TOLERANCE)
    changed = processor_of(CASE, PLAIN)
    changed.load_state_dict(processor.state_dict())
    assert_same(step(processor, 1), step(changed, 1), TOLERANCE)


def slope(processor: FlowProcessor) -> tuple[Tensor, Tensor]:
    """The embedding, and how the landed energies change with it: past the rollout nothing is differentiated."""
    embedding, output = run(processor, 0)
    landed = (output.landings.energy * output.landings.landed[..., None]).square().sum()
    (gradient,) = torch.autograd.grad(landed, embedding, create_graph=True)
    return embedding, gradient


@every_tape
def test_second_derivatives_are_refused(way: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"create_graph = True: .* Set rollout\.engine=autograd"):
        slope(processor_of(CASE, way))


def test_plain_autograd_has_second_derivatives() -> None:
    embedding, gradient = slope(processor_of(CASE, PLAIN))
    gradient.square().sum().backward()
    assert embedding.grad is not None
    assert (embedding.grad != 0).any()


@every_engine
def test_training_after_inference_mode(way: dict[str, Any], expected: Any) -> None:
    processor = processor_of(CASE, way)
    with torch.inference_mode():
        processor(embeddings(1, 5).detach(), rows(1, 5))
    assert_same(step(processor, 0), expected(0), TOLERANCE)
