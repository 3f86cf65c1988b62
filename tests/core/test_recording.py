"""CUDA graphs that can't be recorded: training goes on without them, with the same numbers, and says so once."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core import tape_engine
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


def steps(monkeypatch: pytest.MonkeyPatch, setting: Any) -> list[list[Tensor]]:
    """Gradients of three training steps of a processor that takes its device for one with graphs."""
    processor = CASE.processor()
    engine = processor._tape
    monkeypatch.setattr(engine, "_kind", lambda *_: "kind")
    monkeypatch.setattr(engine, "_settings", engine._settings.model_copy(update={"cuda_graph": setting}))
    monkeypatch.setattr(tape_engine, "_check", lambda *_: None)
    monkeypatch.setattr(tape_engine, "ChunkGraph", Graph)
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
