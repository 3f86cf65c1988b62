"""CUDA graphs that can't be recorded: training goes on without them, with the same numbers, and says so once."""

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core import tape_engine
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.graphs import RecordingError
from tests.helpers import Case

CASE = Case({"spawn.enabled": True}, training=True)


class Graph:
    """Stands in for `ChunkGraph` on a CPU: one of its passes can't be recorded, the other runs at once."""

    fails = "forward"
    asked = 0

    def forward(self, run: Any, surface: Tensor, call: Any) -> Any:
        self._ask("forward")
        result, self.tape = run(surface, call)
        return result

    def backward(self, run: Any, *gradients: Tensor) -> Any:
        self._ask("backward")
        return run(self.tape, *gradients)

    def used(self) -> bool:
        return True

    @classmethod
    def _ask(cls, which: str) -> None:
        cls.asked += which == cls.fails
        if which == cls.fails:
            raise RecordingError("recording a CUDA graph failed (no)")


def with_graphs(monkeypatch: pytest.MonkeyPatch, graph: type, setting: Any = "auto") -> FlowProcessor:
    """A processor that takes its device for one with graphs; they are recorded per batch size."""
    processor = CASE.processor()
    engine = processor._tape
    monkeypatch.setattr(engine, "_kind", lambda surface, call, dtype, keep: (len(surface), keep))
    monkeypatch.setattr(engine, "_settings", engine._settings.model_copy(update={"cuda_graph": setting}))
    monkeypatch.setattr(tape_engine, "_check", lambda *_: None)
    monkeypatch.setattr(tape_engine, "ChunkGraph", graph)
    return processor


def steps(monkeypatch: pytest.MonkeyPatch, setting: Any) -> list[list[Tensor]]:
    """Gradients of three training steps."""
    processor = with_graphs(monkeypatch, Graph, setting)
    found = []
    for _ in range(3):
        loss = processor(CASE.embedding(), CASE.rows()).embedding.square().sum()
        found.append(list(torch.autograd.grad(loss, list(processor.parameters()))))
    return found


@pytest.mark.parametrize("fails", ["forward", "backward", "nothing"])
def test_training_goes_on(fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Graph, "fails", fails)
    monkeypatch.setattr(Graph, "asked", 0)
    with caplog.at_level(logging.WARNING, logger="energy_flow"):
        first, *later = steps(monkeypatch, "auto")
    for gradients in later:
        for actual, expected in zip(gradients, first, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    warned = ["going on without CUDA graphs" in record.getMessage() for record in caplog.records]
    assert warned == ([] if fails == "nothing" else [True])
    assert Graph.asked == len(warned)


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_who_asked_for_graphs_gets_the_error(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "fails", fails)
    with pytest.raises(RecordingError, match="recording a CUDA graph failed"):
        steps(monkeypatch, True)


class Replay:
    """Stands in for `ChunkGraph`: runs, and looks whether the buffers are where they were at the recording."""

    recorded = 0
    processor: FlowProcessor

    def __init__(self) -> None:
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
        for _ in range(3):
            train(3)
        for batch in (20, 20, 7):
            evaluate(batch)
        recorded.append(Replay.recorded)
        if epoch == 2:
            processor.cleanup_memory_safe()  # drops all graphs, which nobody has used, and keeps the buffers
            processor.cleanup_memory_safe()  # of which nobody has needed one
    # Training; training again and both evaluations, once the buffers are large; nothing; all again.
    assert recorded[0] == 2
    assert recorded[1] == recorded[2] == 4
    assert recorded[3] > 4
