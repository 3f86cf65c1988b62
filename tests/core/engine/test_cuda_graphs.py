"""When CUDA graphs are recorded and when they are dropped, on a CPU with stand-ins for graphs."""

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.engine import cuda_graphs
from energy_flow.core.engine import engine as tape_engine
from energy_flow.core.engine.cuda_graphs import ChunkGraph, GraphCache
from energy_flow.core.engine.engine import ExecutionPlan, TapeEngine, TapeJob
from energy_flow.core.engine.packed_weights import PackedWeights
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.rollout import Rollout, RolloutCall
from energy_flow.core.tensors import tensors_of
from tests.helpers import Case

CASE = Case({"spawn.enabled": True}, training=True)


def with_graphs(monkeypatch: pytest.MonkeyPatch, graph: type) -> FlowProcessor:
    """A processor that treats the CPU as a device with graphs, one kind per batch size."""
    processor = CASE.processor()
    engine = processor._engines.tape
    assert isinstance(engine, TapeEngine)
    monkeypatch.setattr(engine, "_kind", lambda surface, job, keep: (len(surface), keep))
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

    def forward(self, run: Any, *values: Any) -> Any:
        before = self._buffers()
        result, self.tape = run(*values)
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
        return {buffer.data_ptr() for buffer in cls.processor._engines.tape._pool._buffers.values()}


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


class NoGraph:
    """Stands in for `torch.cuda.CUDAGraph`: a replay computes nothing."""

    def replay(self) -> None:
        pass


@torch.no_grad()
def test_a_replay_reads_fixed_inputs_and_gives_copies_of_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(cuda_graphs, "_free_stream", lambda device: None)
    monkeypatch.setattr(cuda_graphs, "_recording", lambda *_: contextlib.nullcontext())
    processor = CASE.processor()
    engine = processor._engines.tape
    assert isinstance(engine, TapeEngine)
    recorded: list[tuple[Any, ...]] = []
    rollout, plan = Rollout(processor.lattice, processor.seed), ExecutionPlan(torch.float64, "none")

    def run(surface: Tensor, call: RolloutCall, weights: PackedWeights) -> Any:
        recorded.append((surface, call, weights))
        job = TapeJob(rollout, call, weights, plan, keep=True)
        return engine._run(surface, call, weights, job=job, keep=True)

    def inputs(seed: int) -> tuple[Tensor, RolloutCall, PackedWeights]:
        rule = processor.move_rule()._replace(scale=torch.tensor(0.5 + seed, dtype=torch.float64))
        ids = torch.arange(3) + 10 * seed
        call = RolloutCall(sample_ids=ids, optimizer_step=torch.tensor(seed), rule=rule, noisy=True, keep_paths=False)
        with torch.no_grad():
            processor.carrier.energy_head.weight.fill_(0.1 * seed)
        weights = PackedWeights.pack(processor.neuron, processor.carrier, torch.float64)
        return torch.full((3, 6, 1), 0.1 * seed, dtype=torch.float64), call, weights

    graph = ChunkGraph(torch.device("cpu"))
    results = [graph.forward(run, *inputs(seed)) for seed in (1, 2)]
    gradients = [torch.full((3, 12, size), 0.3, dtype=torch.float64) for size in (3, 1)]
    graph.backward(lambda tape, *values: recorded.append(values), *gradients)
    assert len(recorded) == 2, "each pass is recorded once"
    for fixed, value in zip(tensors_of(recorded[0]), tensors_of(inputs(2)), strict=True):
        assert torch.equal(fixed, value)
    for fixed, value in zip(tensors_of(recorded[1]), gradients, strict=True):
        assert torch.equal(fixed, value)
        assert fixed.data_ptr() != value.data_ptr()
    outputs = [{tensor.data_ptr() for tensor in tensors_of(result)} for result in (graph._result, *results)]
    assert outputs[0] & outputs[1] == outputs[0] & outputs[2] == outputs[1] & outputs[2] == set()
    assert tensors_of(results[0].counts)


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
