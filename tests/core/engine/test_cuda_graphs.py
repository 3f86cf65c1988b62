"""When CUDA graphs are recorded and when they are dropped, on a CPU with stand-ins for graphs."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.engine import cuda_graphs
from energy_flow.core.engine import engine as tape_engine
from energy_flow.core.engine.cuda_graphs import GraphCache
from energy_flow.core.engine.engine import TapeEngine
from energy_flow.core.flow_processor import FlowProcessor
from tests.helpers import Case

CASE = Case({"spawn.enabled": True}, training=True)


def with_graphs(monkeypatch: pytest.MonkeyPatch, graph: type) -> FlowProcessor:
    """A processor that treats the CPU as a device with graphs, one kind per batch size."""
    processor = CASE.processor()
    engine = processor._engine
    assert isinstance(engine, TapeEngine)
    monkeypatch.setattr(engine, "_kind", lambda surface, call, dtype, keep: (len(surface), keep))
    monkeypatch.setattr(engine, "_settings", engine._settings.model_copy(update={"cuda_graph": True}))
    monkeypatch.setattr(tape_engine, "_check", lambda *_: None)
    monkeypatch.setattr(cuda_graphs, "ChunkGraph", graph)
    return processor


class Replay:
    """Stands in for `ChunkGraph`: runs the code, and checks that the buffers have not moved since the recording."""

    recorded = 0
    processor: FlowProcessor

    def __init__(self, device: torch.device) -> None:
        self._addresses: set[int] | None = None

    def forward(self, run: Any, surface: Tensor, call: Any) -> Any:
        before = self._buffers()
        result, self.tape = run(surface, call)
        if self._addresses is None:
            type(self).recorded += 1
            assert self._buffers() == before, "a buffer was allocated while the graph was recorded"
            self._addresses = before
        assert self._addresses <= self._buffers(), "the graph would write to memory that the rollout has freed"
        return result

    def backward(self, run: Any, *gradients: Tensor) -> Any:
        return run(self.tape, *gradients)

    def used(self) -> bool:
        return False

    @classmethod
    def _buffers(cls) -> set[int]:
        return {buffer.data_ptr() for buffer in cls.processor._pool._buffers.values()}


def test_graphs_are_recorded_again_after_their_buffers_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation in larger batches takes larger buffers; a clean-up trims them again."""
    monkeypatch.setattr(Replay, "recorded", 0)
    processor = with_graphs(monkeypatch, Replay)
    monkeypatch.setattr(Replay, "processor", processor, raising=False)

    def train(batch: int) -> None:
        case = dataclasses.replace(CASE, batch=batch)
        processor(case.embedding(), case.rows()).embedding.sum().backward()

    def evaluate(batch: int) -> None:
        case = dataclasses.replace(CASE, batch=batch)
        with torch.no_grad():
            processor(case.embedding(), case.rows())

    recorded = []
    for epoch in range(4):
        for _ in range(4):
            train(3)
        for batch in (20, 20, 20, 7):
            evaluate(batch)
        recorded.append(Replay.recorded)
        if epoch == 2:
            processor.cleanup_memory_safe()  # drops all graphs: the stand-ins say that they were unused
            processor.cleanup_memory_safe()  # frees all buffers: no batch needed one since
    # Epoch 0: training and the larger evaluation. Epoch 1: training again, since the buffers moved. Epoch 2: the
    # smaller evaluation, which has run twice by then. Epoch 3, after the clean-up: the first two again.
    assert recorded == [2, 3, 4, 6]


class Idle:
    """Stands in for `ChunkGraph`: does nothing."""

    was_used = False

    def __init__(self, device: torch.device) -> None:
        pass

    def used(self) -> bool:
        return self.was_used


def test_the_least_recently_used_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "ChunkGraph", Idle)
    graphs = GraphCache()
    device = torch.device("cpu")
    for kind in range(GraphCache._GRAPHS + 1):
        for _ in range(GraphCache._RUNS):
            assert graphs.get(kind, device) is None
            graphs.count_run(kind)
        if kind == GraphCache._GRAPHS:
            oldest_but_used = graphs.get(0, device)
        assert graphs.get(kind, device) is not None
    assert len(graphs) == GraphCache._GRAPHS
    assert graphs.get(0, device) is oldest_but_used
    assert graphs.get(1, device) is None


def test_graphs_without_a_run_between_two_cleanups_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "ChunkGraph", Idle)
    graphs, device = GraphCache(), torch.device("cpu")
    for kind in "ab":
        for _ in range(GraphCache._RUNS):
            graphs.count_run(kind)
        graphs.get(kind, device)
    used = graphs.get("a", device)
    assert isinstance(used, Idle)
    used.was_used = True
    graphs.drop_unused()
    assert len(graphs) == 1
    assert graphs.get("a", device) is used
    assert graphs.get("b", device) is None


def test_copies_start_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "ChunkGraph", Idle)
    graphs, device = GraphCache(), torch.device("cpu")
    for kind in "aab":
        graphs.count_run(kind)
    assert graphs.get("a", device) is not None
    copied = copy.deepcopy(graphs)
    assert len(copied) == 0
    copied.count_run("b")
    assert copied.get("b", device) is None
    assert len(graphs) == 1
