"""One set of buffers for all batches: in whatever order batches run forward and backward, nobody gets another's."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.engine.tape import Tape
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from tests.core.test_memory import Mark, Marked
from tests.core.ways import ENGINES, PLAIN, assert_identical, assert_same, processor_of, tape
from tests.helpers import DIM, Case, tensors_of

# Flows spawn, and end early, on both planes.
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
    """A batch of its own, and what comes of it."""
    embedding = embeddings(seed, batch)
    return embedding, processor(embedding, rows(seed, batch), record_trajectories=True)


def loss_of(output: FlowOutput) -> Tensor:
    """A sum over samples, so that batches add up."""
    weights = torch.linspace(-1, 2, DIM, dtype=output.embedding.dtype)
    return (output.embedding * weights).sum() + output.surface.square().sum()


def parameter_gradients(processor: FlowProcessor) -> dict[str, Tensor]:
    """Takes them away."""
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
    """Two calls with the same numbers are still two."""
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
    """The noise of a replay is the forward pass's, though the step has changed since."""
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
    """Of landed energies alone, and of one sample alone; what isn't asked for gets nothing."""
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
def test_weights_changed_before_the_backward_pass_are_refused(way: dict[str, Any], name: str) -> None:
    """Also biases, of which autograd itself would not need the old values: a replay does."""
    processor = processor_of(CASE, way)
    _, output = run(processor, 0)
    with torch.no_grad():
        processor.get_parameter(name).mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(output).backward()
    processor.zero_grad()
    step(processor, 1)  # the next batch runs


def slope(processor: FlowProcessor) -> tuple[Tensor, Tensor]:
    """The embedding, and how the landed energies change with it: past the rollout nothing is differentiated."""
    embedding, output = run(processor, 0)
    landed = (output.landings.energy * output.landings.landed[..., None]).square().sum()
    (gradient,) = torch.autograd.grad(landed, embedding, create_graph=True)
    return embedding, gradient


@every_tape
def test_second_derivatives_are_refused(way: dict[str, Any]) -> None:
    _, gradient = slope(processor_of(CASE, way))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_plain_autograd_has_second_derivatives() -> None:
    embedding, gradient = slope(processor_of(CASE, PLAIN))
    gradient.square().sum().backward()
    assert embedding.grad is not None
    assert (embedding.grad != 0).any()


@every_engine
def test_outputs_and_gradients_are_never_overwritten(way: dict[str, Any]) -> None:
    processor = processor_of(CASE, way)
    embedding, output = run(processor, 0, 5)
    loss_of(output).backward(retain_graph=True)
    held = {**tensors_of(output), **with_embedding(processor, embedding)}
    assert len(held) > 45
    before = {name: tensor.detach().clone() for name, tensor in held.items()}
    for seed, batch in ((1, 5), (2, 3), (3, 7)):
        step(processor, seed, batch)
    with torch.no_grad():
        run(processor, 4, 5)
    loss_of(output).backward()
    processor.cleanup_memory_safe()
    run(processor, 5, 6)
    assert_identical({name: tensor.detach() for name, tensor in held.items()}, before)


@every_engine
@pytest.mark.parametrize("trained", [True, False], ids=["after the backward pass", "without a backward pass"])
def test_nothing_of_the_graph_is_alive(way: dict[str, Any], trained: bool) -> None:
    processor, mark = processor_of(CASE, way), Mark()
    graph, embedding = weakref.ref(mark), embeddings(0)
    output = processor(Marked.apply(embedding, mark), rows(0), record_trajectories=True)
    del mark
    gc.collect()
    assert graph() is not None, "the output's graph holds it"
    if trained:
        loss_of(output).backward()
    del output
    gc.collect()
    assert graph() is None


@every_tape
def test_there_is_one_tape_at_a_time(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where chunks differ in size, and the next one takes larger buffers."""
    begin, alive = Tape.__init__, []

    def watched(self: Tape, *args: Any, **kwargs: Any) -> None:
        assert all(other() is None for other in alive)
        alive.append(weakref.ref(self))
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Tape, "__init__", watched)
    processor = processor_of(CASE, way)
    for seed in range(2):
        step(processor, seed, batch=7)
    assert len(alive) >= 2


@every_engine
@pytest.mark.parametrize("trained", [True, False], ids=["after a backward pass", "after a forward pass"])
def test_a_model_is_gone_when_nobody_holds_it(way: dict[str, Any], trained: bool) -> None:
    """Without a garbage collection: its buffers may be most of the memory that there is."""
    processor = processor_of(CASE, way)
    if trained:
        step(processor, 0)
    else:
        run(processor, 0)
    pool = weakref.ref(processor._pool)
    gc.collect()
    gc.disable()
    try:
        del processor
        assert pool() is None
    finally:
        gc.enable()


def live_bytes() -> int:
    """Of every block of memory that a tensor holds on to."""
    gc.collect()
    # By type: to ask an object whether it is an instance may run code of its own.
    storages = [item.untyped_storage() for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@every_engine
def test_memory_after_batch_50_is_memory_after_batch_3(way: dict[str, Any]) -> None:
    processor = processor_of(CASE, way)
    processor.zero_grad()
    after = []
    for number in range(50):
        step(processor, number % 3)
        if number % 7 == 0:
            with torch.no_grad():
                run(processor, 3, 2)
        if number in (2, 49):
            run(processor, 0)  # the last output is that of the same batch
            after.append(live_bytes())
    assert after[1] == after[0]


@every_engine
def test_training_after_inference_mode(way: dict[str, Any], expected: Any) -> None:
    processor = processor_of(CASE, way)
    with torch.inference_mode():
        processor(embeddings(1, 5).detach(), rows(1, 5))
    assert_same(step(processor, 0), expected(0), TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compaction", [False, True])
def test_buffers_grow_with_the_chunk_and_not_with_the_batch(recompute: bool, compaction: bool) -> None:
    sizes = {}
    for chunk, batch in ((2, 4), (2, 16), (4, 16)):
        processor = processor_of(CASE, tape(chunk=chunk, recompute=recompute, compaction=compaction))
        step(processor, 0, batch)
        sizes[chunk, batch] = processor._pool.nbytes
    assert sizes[2, 16] == sizes[2, 4]
    assert 1.7 * sizes[2, 16] < sizes[4, 16] <= 2 * sizes[2, 16]


def test_recompute_keeps_no_gates() -> None:
    bytes_held = []
    for recompute in (False, True):
        processor = processor_of(CASE, tape(recompute=recompute))
        step(processor, 0)
        bytes_held.append(processor._pool.nbytes)
    layers, steps, capacity, batch, size, double = 2, 4, 16, 3, 5, 8
    gates = capacity * batch * 4 * size * double
    assert bytes_held[0] - bytes_held[1] == (layers * steps - 1) * gates
