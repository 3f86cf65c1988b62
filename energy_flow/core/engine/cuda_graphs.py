"""CUDA graphs: a chunk's forward and backward pass recorded once, and replayed with a single launch each."""

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energy_flow.core.engine.chunking import is_out_of_memory
from energy_flow.core.engine.packed_weights import StepGradients
from energy_flow.core.engine.tape import Tape
from energy_flow.core.rollout import RolloutCall, RolloutResult
from energy_flow.core.tensorized_flow_storage import FinishedFlows
from energy_flow.errors import RecordingError

Forward = Callable[[Tensor, RolloutCall], tuple[RolloutResult, Tape]]
Backward = Callable[[Tape, Tensor, Tensor], tuple[Tensor, StepGradients]]


class _Replay(NamedTuple):
    """A recorded pass: its inputs are written to, its outputs are read, between them the graph is launched."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]


class ChunkGraph:
    """The two passes of chunks of one size, recorded when they are first asked for.

    What they run must have run before, so that kernels are compiled and libraries are set up. Inputs are copied to
    fixed places; outputs are copied from theirs, since the next replay overwrites them.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Of its own: libraries keep workspaces by stream, and torch lets go of a stream's when a graph of it goes.
        self._stream = _free_stream(device)
        _alive.add(self)
        self._used = False
        self.tape: Tape  # of the recorded forward pass
        self._forward: _Replay | None = None
        self._backward: _Replay | None = None

    def used(self) -> bool:
        """Whether it ran since the last time that somebody asked."""
        used, self._used = self._used, False
        return used

    def forward(self, run: Forward, surface: Tensor, call: RolloutCall) -> RolloutResult:
        """Surface energies [b, S, E] to flows that have ended; `run` is plain code without autograd."""
        self._used = True
        values = (surface, call.optimizer_step, call.scale, *(() if call.rows is None else (call.rows,)))
        if self._forward is None:
            inputs = _own(values)
            rows = inputs[3] if len(inputs) > 3 else None
            fixed = RolloutCall(rows, inputs[1], inputs[2], call.noisy, keep_paths=False)
            graph = torch.cuda.CUDAGraph()
            with _recording(graph, self._pool, self._stream):
                self._result, self.tape = run(inputs[0], fixed)
            self._forward = _Replay(graph, inputs)
        _launch(self._forward, values)
        return _copy(self._result)

    def backward(self, run: Backward, grad_position: Tensor, grad_energy: Tensor) -> tuple[Tensor, StepGradients]:
        """After `forward`: gradients of the energies at the start, and of the weights; valid until the next call."""
        values = (grad_position, grad_energy)
        if self._backward is None:
            inputs = _own(values)
            graph = torch.cuda.CUDAGraph()
            with _recording(graph, self._pool, self._stream):
                self._gradients = run(self.tape, *inputs)
            self._backward = _Replay(graph, inputs)
        _launch(self._backward, values)
        return self._gradients


_alive: weakref.WeakSet[ChunkGraph] = weakref.WeakSet()


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """One that no other graph has, unless all are taken: torch hands out 32 in turn."""
    taken = {graph._stream.cuda_stream for graph in _alive}
    streams = [torch.cuda.Stream(device) for _ in range(32)]
    return next((stream for stream in streams if stream.cuda_stream not in taken), streams[0])


class GraphCache:
    """Graphs by kind of chunk. What runs once or twice is not worth one; nor is what hasn't run for long."""

    _RUNS, _GRAPHS = 2, 8  # runs before a kind is recorded, and the most graphs that are kept

    def __init__(self) -> None:
        self._runs: dict[Hashable, int] = {}  # of kinds that aren't recorded, with the buffers that there are
        self._graphs: dict[Hashable, ChunkGraph] = {}  # the last one used at the end

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": {}, "_graphs": {}}  # a copy begins empty

    def __len__(self) -> int:
        return len(self._graphs)

    def ran(self, kind: Hashable) -> None:
        """A chunk has run both ways, or the one that there is: kernels are compiled, and buffers are large enough."""
        self._runs[kind] = self._runs.get(kind, 0) + 1

    def get(self, kind: Hashable, device: torch.device) -> ChunkGraph | None:
        """The kind's graph; a new one once it is time to record; None before."""
        graph = self._graphs.pop(kind, None)
        if graph is None:
            if self._runs.get(kind, 0) < self._RUNS:
                return None
            del self._runs[kind]
            graph = ChunkGraph(device)
        self._graphs[kind] = graph
        if len(self._graphs) > self._GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def drop_unused(self) -> None:
        """Let go of graphs that haven't run since the last call."""
        self._runs.clear()
        self._graphs = {kind: graph for kind, graph in self._graphs.items() if graph.used()}

    def clear(self) -> None:
        """Let go of all graphs."""
        self._runs.clear()
        self._graphs.clear()


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is launched inside goes into the graph, from this thread."""
    # Garbage of others, graphs and events perhaps, must not be freed in the middle: CUDA would give the recording up.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Nothing to go on from: torch (2.11) leaves its random generator and its allocator as if it still recorded.
        said = str(error).splitlines()[0]
        raise RecordingError(f"a CUDA graph can't be recorded: {said}. Set rollout.cuda_graph=false") from error
    finally:
        if collecting:
            gc.enable()


def _own(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Never inference tensors, whoever asks first: others could not write to them.
    with torch.inference_mode(False):
        inputs = tuple(torch.empty_like(value) for value in values)
    return tuple(own.copy_(value) for own, value in zip(inputs, values, strict=True))


def _launch(replay: _Replay, values: tuple[Tensor, ...]) -> None:
    for fixed, value in zip(replay.inputs, values, strict=True):
        fixed.copy_(value)
    replay.graph.replay()


def _copy(result: RolloutResult) -> RolloutResult:
    flows = FinishedFlows(*(value.clone() for value in vars(result.flows).values()))
    return RolloutResult(flows, result.counts.clone(), None)
