"""CUDA graphs: a chunk's forward and backward pass, each recorded once and then replayed with a single launch."""

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from energy_flow.core.engine.chunking import is_out_of_memory
from energy_flow.core.engine.packed_weights import PackedGradients, PackedWeights
from energy_flow.core.engine.tape import Tape
from energy_flow.core.rollout import RolloutCall, RolloutResult
from energy_flow.core.tensors import map_tensors, tensors_of
from energy_flow.errors import RecordingError

Forward = Callable[[Tensor, RolloutCall, PackedWeights], tuple[RolloutResult, Tape]]
Backward = Callable[[Tape, Tensor, Tensor], tuple[Tensor, PackedGradients]]
_Record = TypeVar("_Record")


class _Replay(NamedTuple):
    """A recorded pass. To replay it, write its inputs, launch the graph, and read its outputs."""

    graph: torch.cuda.CUDAGraph
    inputs: Any  # a record of tensors


class ChunkGraph:
    """The two passes of chunks of one size, each recorded at its first call.

    The code to record must have run before, so that kernels are compiled and libraries are set up. Inputs are copied to
    fixed addresses. Outputs are copied from fixed addresses, since the next replay overwrites them.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Every graph has a stream of its own: libraries have workspaces per stream, and torch frees those of a stream
        # together with its graph.
        self._stream = _free_stream(device)
        _alive.add(self)
        self._used = False
        self.tape: Tape  # of the recorded forward pass
        self._forward: _Replay | None = None
        self._backward: _Replay | None = None

    def used(self) -> bool:
        """Whether the graph ran since the last call of this method."""
        used, self._used = self._used, False
        return used

    def forward(self, run: Forward, surface: Tensor, call: RolloutCall, weights: PackedWeights) -> RolloutResult:
        """Run a chunk from surface energies [b, S, E] to ended flows; `run` is plain code without autograd."""
        self._used = True
        values = (surface, call, weights)
        if self._forward is None:
            inputs = _own_copy(values)
            graph = torch.cuda.CUDAGraph()
            with _recording(graph, self._pool, self._stream):
                self._result, self.tape = run(*inputs)
            self._forward = _Replay(graph, inputs)
        _launch(self._forward, values)
        return map_tensors(Tensor.clone, self._result)

    def backward(self, run: Backward, grad_position: Tensor, grad_energy: Tensor) -> tuple[Tensor, PackedGradients]:
        """The backward pass of the last `forward`.

        Returns:
            The gradients of the energies at the start and of the weights, valid until the next call.
        """
        values = (grad_position, grad_energy)
        if self._backward is None:
            inputs = _own_copy(values)
            graph = torch.cuda.CUDAGraph()
            with _recording(graph, self._pool, self._stream):
                self._gradients = run(self.tape, *inputs)
            self._backward = _Replay(graph, inputs)
        _launch(self._backward, values)
        return self._gradients


_alive: weakref.WeakSet[ChunkGraph] = weakref.WeakSet()


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other graph has, unless all are taken: torch hands out 32 in turn."""
    taken = {graph._stream.cuda_stream for graph in _alive}
    streams = [torch.cuda.Stream(device) for _ in range(32)]
    return next((stream for stream in streams if stream.cuda_stream not in taken), streams[0])


class GraphCache:
    """CUDA graphs by kind of chunk. A kind gets a graph after it has run twice; the least recently used one goes."""

    _RUNS, _GRAPHS = 2, 8  # runs of a kind before it is recorded, and the most graphs to keep

    def __init__(self) -> None:
        self._runs: dict[Hashable, int] = {}  # of kinds without a graph, with the present buffers
        self._graphs: dict[Hashable, ChunkGraph] = {}  # the last used one at the end

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": {}, "_graphs": {}}  # a copy starts empty

    def __len__(self) -> int:
        return len(self._graphs)

    def count_run(self, kind: Hashable) -> None:
        """Count a chunk that has run all its passes: its kernels are compiled, and its buffers are large enough."""
        self._runs[kind] = self._runs.get(kind, 0) + 1

    def get(self, kind: Hashable, device: torch.device) -> ChunkGraph | None:
        """The kind's graph; a new one when it is time to record; None before."""
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
        """Drop graphs that haven't run since the last call."""
        self._runs.clear()
        self._graphs = {kind: graph for kind, graph in self._graphs.items() if graph.used()}

    def clear(self) -> None:
        """Drop all graphs."""
        self._runs.clear()
        self._graphs.clear()


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record everything that this thread launches inside the `with` block."""
    # No garbage collection while recording: CUDA would cancel it if other graphs or events were freed.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # No recovery: afterwards torch (2.11) leaves its random generator and allocator in recording mode.
        first_line = str(error).splitlines()[0]
        raise RecordingError(f"a CUDA graph can't be recorded: {first_line}. Set rollout.cuda_graph=false") from error
    finally:
        if collecting:
            gc.enable()


def _own_copy(values: _Record) -> _Record:
    """A copy of a record in tensors of its own."""
    # Never inference tensors, even if inference mode asks first: later calls could not write to them.
    with torch.inference_mode(False):
        own = map_tensors(torch.empty_like, values)
    return map_tensors(Tensor.copy_, own, values)


def _launch(replay: _Replay, values: Any) -> None:
    torch._foreach_copy_(tensors_of(replay.inputs), tensors_of(values))
    replay.graph.replay()
