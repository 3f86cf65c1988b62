"""Memory of both engines: nothing is overwritten, nothing is kept for long, nothing grows."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.engine.tape import Tape
from tests.core.engine.batches import (
    CASE,
    embeddings,
    every_engine,
    every_tape,
    loss_of,
    rows,
    run,
    step,
    with_embedding,
)
from tests.core.test_memory import Mark, Marked
from tests.core.ways import assert_identical, processor_of, tape
from tests.helpers import tensors_of


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
def test_no_graph_is_kept(way: dict[str, Any], trained: bool) -> None:
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
def test_a_model_is_freed_with_its_last_reference(way: dict[str, Any], trained: bool) -> None:
    """Without a garbage collection: its buffers may be most of the memory."""
    processor = processor_of(CASE, way)
    if trained:
        step(processor, 0)
    else:
        run(processor, 0)
    pool = weakref.ref(processor._engines.tape._pool)
    gc.collect()
    gc.disable()
    try:
        del processor
        assert pool() is None
    finally:
        gc.enable()


def live_bytes() -> int:
    """Bytes of every block of memory that a tensor holds."""
    gc.collect()
    # By type: `isinstance` may run code of the object.
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compaction", [False, True])
def test_buffers_grow_with_the_chunk_and_not_with_the_batch(recompute: bool, compaction: bool) -> None:
    sizes = {}
    for chunk, batch in ((2, 4), (2, 16), (4, 16)):
        processor = processor_of(CASE, tape(chunk=chunk, recompute=recompute, compaction=compaction))
        step(processor, 0, batch)
        sizes[chunk, batch] = processor._engines.tape._pool.nbytes
    assert sizes[2, 16] == sizes[2, 4]
    assert 1.7 * sizes[2, 16] < sizes[4, 16] <= 2 * sizes[2, 16]


def test_recompute_keeps_no_gates() -> None:
    bytes_held = []
    for recompute in (False, True):
        processor = processor_of(CASE, tape(recompute=recompute))
        step(processor, 0)
        bytes_held.append(processor._engines.tape._pool.nbytes)
    layers, steps, capacity, batch, size, double = 2, 4, 16, 3, 5, 8
    gates = capacity * batch * 4 * size * double
    assert bytes_held[0] - bytes_held[1] == (layers * steps - 1) * gates
