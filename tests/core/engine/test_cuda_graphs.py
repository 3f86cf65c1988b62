"""When CUDA graphs are recorded, and when they are let go: with stand-ins, on a CPU."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.engine import cuda_graphs as graphs
from energy_flow.core.engine import engine as tape_engine
from energy_flow.core.engine.cuda_graphs import GraphCache
from energy_flow.core.flow_processor import FlowProcessor
from tests.helpers import Case

CASE = Case({"spawn.enabled": True}, training=True)


def with_graphs(monkeypatch: pytest.MonkeyPatch, graph: type) -> FlowProcessor:
    """A processor that takes its device for one with graphs; they are recorded per batch size."""
    processor = CASE.processor()
    engine = processor._engine
    monkeypatch.setattr(engine, "_kind", lambda surface, call, dtype, keep: (len(surface), keep))
    monkeypatch.setattr(engine, "_settings", engine._settings.model_copy(update={"cuda_graph": True}))
    monkeypatch.setattr(tape_engine, "_check", lambda *_: None)
    monkeypatch.setattr(graphs, "ChunkGraph", graph)
    return processor


class Replay:
    """Stands in for `ChunkGraph`: runs, and looks whether the buffers are where they were at the recording."""

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
        assert self._addresses <= self._buffers(), "the graph would write to memory that isn't the rollout's any more"
        return result

    def backward(self, run: Any, *gradients: Tensor) -> Any:
        return run(self.tape, *gradients)

    def used(self) -> bool:
        return False

    @classmethod
    def _buffers(cls) -> set[int]:
        return {buffer.data_ptr() for buffer in cls.processor._pool._buffers.values()}


def test_graphs_are_recorded_again_where_their_buffers_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation in larger batches takes larger buffers; a clean-up trims them."""
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
            processor.cleanup_memory_safe()  # drops all graphs, which nobody has used, and keeps the buffers
            processor.cleanup_memory_safe()  # of which nobody has needed one
    # Training and the larger evaluation; training once more, since the buffers are others; the smaller evaluation,
    # which has run twice by then; after the clean-up the first two.
    assert recorded == [2, 3, 4, 6]


class Idle:
    """Stands in for `ChunkGraph`: is kept."""

    was_used = False

    def __init__(self, device: torch.device) -> None:
        pass

    def used(self) -> bool:
        return self.was_used


def test_graphs_that_have_not_run_for_long_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ChunkGraph", Idle)
    recordings = GraphCache()
    device = torch.device("cpu")
    for kind in range(GraphCache._GRAPHS + 1):
        for _ in range(GraphCache._RUNS):
            assert recordings.get(kind, device) is None
            recordings.ran(kind)
        if kind == GraphCache._GRAPHS:
            oldest_but_used = recordings.get(0, device)
        assert recordings.get(kind, device) is not None
    assert len(recordings) == GraphCache._GRAPHS
    assert recordings.get(0, device) is oldest_but_used
    assert recordings.get(1, device) is None


def test_what_is_not_used_between_two_cleanups_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ChunkGraph", Idle)
    recordings, device = GraphCache(), torch.device("cpu")
    for kind in "ab":
        for _ in range(GraphCache._RUNS):
            recordings.ran(kind)
        recordings.get(kind, device)
    used = recordings.get("a", device)
    assert isinstance(used, Idle)
    used.was_used = True
    recordings.drop_unused()
    assert len(recordings) == 1
    assert recordings.get("a", device) is used
    assert recordings.get("b", device) is None


def test_copies_begin_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ChunkGraph", Idle)
    recordings, device = GraphCache(), torch.device("cpu")
    for kind in "aab":
        recordings.ran(kind)
    assert recordings.get("a", device) is not None
    copied = copy.deepcopy(recordings)
    assert len(copied) == 0
    copied.ran("b")
    assert copied.get("b", device) is None
    assert len(recordings) == 1
