"""What flows remember, over all steps: the recurrent network's part of the tape, forward and in reverse.

A slab of the tape holds, for every flow, [x | h of layer 0 | ... | h of layer L - 1], each part one step behind the
one before it: slab s has the input of step s and the memory that layer l had after s - l steps. So the [x | h] that
a layer reads is one range of columns, over all steps it is one strided matrix, and nothing is ever concatenated.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.engine.compiled import StepKernels
from energy_flow.core.engine.packed_weights import StepGradients, StepWeights
from energy_flow.core.tensorized_flow_storage import TensorPool
from energy_flow.ops.backend import use_triton
from energy_flow.ops.gru_gates import gates_backward_in_place


@dataclass
class Segment:
    """Consecutive steps of one set of flows: a stretch of the tape's rows, n to a step."""

    number: int  # 0 for the first
    num_rows: int  # n
    first_slab: int  # row of the tape where its slabs begin
    first_gate: int  # row where its gates begin
    steps: int = 0  # so far


class MemoryTape:
    """The memories of flows in the rows of its current segment.

    Args:
        weights: packed.
        num_steps: T of the rollout.
        num_rows: flows of the first segment, as many as any may have.
        max_segments: how many there may be.
        keep: for a backward pass.
        recompute: gates in the backward pass, instead of keeping them.
        pool: of the buffers; another tape on it overwrites this one.
    """

    def __init__(
        self,
        weights: StepWeights,
        functions: StepKernels,
        num_steps: int,
        num_rows: int,
        max_segments: int,
        keep: bool,
        recompute: bool,
        pool: TensorPool,
    ) -> None:
        layers, size = len(weights.layers), weights.hidden_size
        self._weights, self._functions = weights, functions
        self._keep, self._keep_gates = keep, keep and not recompute
        # What isn't kept runs in a ring of slabs; a new segment begins in a ring of its own.
        self._ring = layers + 1
        slabs = num_steps + layers * max_segments if keep else self._ring * min(max_segments, 2)
        device, dtype = weights.head_weight.device, weights.layers[0].memory.dtype
        self._slabs = pool.take("slabs", (slabs * num_rows, weights.row_size), dtype, device)
        # Kernels leave the gates' gradients where the products were.
        self._all_at_once = self._keep_gates and use_triton(self._slabs)
        gates = (layers, num_steps * num_rows, 4 * size) if self._keep_gates else (1, num_rows, 4 * size)
        self._gate_rows = pool.take("gates", gates, dtype, device)
        self._gates_backward = functions.gates_backward
        if recompute and device.type == "cpu" and not use_triton(self._slabs):
            self._gates_backward = functools.partial(gates_backward_in_place, functions.gates_backward)
        self.segment = Segment(0, num_rows, 0, 0)
        for layer in range(layers):
            self._memory(self.segment, layer, 0).zero_()

    def input(self) -> Tensor:
        """Where the next step's input [n, X] has to be written."""
        return self._slab(self.segment, self.segment.steps)[:, : self._weights.input_size]

    def forward(self, count: Tensor | None = None) -> Tensor:
        """One step of all layers; returns the last layer's memory [n, H], a view of the tape.

        Args:
            count: int64 scalar: so many leading rows are in use; the memories of the others stay finite. None: all.
        """
        segment, step = self.segment, self.segment.steps
        for number, layer in enumerate(self._weights.layers):
            gates, both = self._gates(segment, number, step), self._both(segment, number, step)
            layer.products(both, gates, self._is_first(segment, step), count)
            following = self._memory(segment, number, step + 1)
            self._functions.gates_forward(gates, both[:, layer.input_size :], layer.bias, following, count)
        segment.steps += 1
        return self.top(segment, step)

    def top(self, segment: Segment, step: int) -> Tensor:
        """The last layer's memory after a step of a segment, [n, H]."""
        return self._memory(segment, len(self._weights.layers) - 1, step + 1)

    def exchange(self, source: Tensor) -> None:
        """Row i takes over the memories of row source[i]."""
        for number in range(len(self._weights.layers)):
            memory = self._memory(self.segment, number, self.segment.steps)
            memory.copy_(memory[source])

    def restart(self, source: Tensor) -> None:
        """Go on with other flows: row i of a new segment has the memories of row source[i] of this one."""
        before = self.segment
        if self._keep:
            first_slab = before.first_slab + (before.steps + len(self._weights.layers)) * before.num_rows
        else:
            first_slab = (before.number + 1) % 2 * (len(self._slabs) // 2)
        first_gate = before.first_gate + before.steps * before.num_rows
        self.segment = Segment(before.number + 1, len(source), first_slab, first_gate)
        for number in range(len(self._weights.layers)):
            memory = self._memory(before, number, before.steps)
            torch.index_select(memory, 0, source, out=self._memory(self.segment, number, 0))

    def no_gradients(self) -> list[Tensor]:
        """Zeros [n, H] for the memories of every layer, of the last segment."""
        shape = (self.segment.num_rows, self._weights.hidden_size)
        return [self._slabs.new_zeros(shape) for _ in self._weights.layers]

    def backward(
        self,
        segment: Segment,
        step: int,
        grad_memory: list[Tensor],
        gradients: StepGradients,
        count: Tensor | None = None,
    ) -> Tensor:
        """The way back through one step; steps must come in reverse order.

        Args:
            grad_memory: L gradients [n, H] of the memories after the step; become those before it.
            gradients: where bias gradients are added, and the weights' unless `add_weight_gradients` does it.
            count: the step's; `grad_memory` is 0 in the other rows.

        Returns:
            Gradient of the step's input, [n, X].
        """
        layers, first = self._weights.layers, self._is_first(segment, step)
        for number in reversed(range(len(layers))):
            layer, sums = layers[number], gradients.layers[number]
            gates, both = self._gates(segment, number, step), self._both(segment, number, step)
            if not self._keep_gates:
                layer.products(both, gates, first, count)
            on_gates, on_memory = self._gates_backward(
                gates, both[:, layer.input_size :], grad_memory[number], layer.bias, sums.bias, count
            )
            grad_memory[number] = on_memory
            if not first:  # nobody asks for the gradient of an empty memory
                layer.add_memory_gradient(on_gates, on_memory, count)
            if not self._all_at_once:
                sums.add(on_gates, both, len(both) if first else 0)
            if number > 0:
                layer.add_input_gradient(on_gates, grad_memory[number - 1], count)
                del on_gates  # large, and not to be held while the next layer's are made
        return layers[0].input_gradient(on_gates, count)

    def add_weight_gradients(self, segment: Segment, gradients: StepGradients) -> None:
        """After the last step back in a segment: weight gradients over all its steps and flows at once, on a GPU."""
        if not self._all_at_once:
            return  # they were added step by step
        num_rows = segment.steps * segment.num_rows
        for number, sums in enumerate(gradients.layers):
            first_slab = segment.first_slab + number * segment.num_rows
            columns = slice(*self._columns(number))
            gates = self._gate_rows[number, segment.first_gate : segment.first_gate + num_rows]
            num_empty = segment.num_rows if self._is_first(segment, 0) else 0
            sums.add(gates, self._slabs[first_slab : first_slab + num_rows, columns], num_empty)

    def _slab(self, segment: Segment, index: int) -> Tensor:
        first = segment.first_slab + (index if self._keep else index % self._ring) * segment.num_rows
        return self._slabs[first : first + segment.num_rows]

    @staticmethod
    def _is_first(segment: Segment, step: int) -> bool:
        """Whether it is the rollout's first step, before which all memories are empty."""
        return segment.number == 0 and step == 0

    def _columns(self, layer: int) -> tuple[int, int]:
        """Columns of [x | h] of a layer."""
        size, first = self._weights.hidden_size, self._weights.input_size
        return (0 if layer == 0 else first + (layer - 1) * size), first + (layer + 1) * size

    def _both(self, segment: Segment, layer: int, step: int) -> Tensor:
        """What a layer reads in a step, [x | h] [n, X + H]."""
        first, last = self._columns(layer)
        return self._slab(segment, step + layer)[:, first:last]

    def _memory(self, segment: Segment, layer: int, steps: int) -> Tensor:
        """Memory of a layer after a number of steps, [n, H]."""
        last = self._columns(layer)[1]
        return self._slab(segment, steps + layer)[:, last - self._weights.hidden_size : last]

    def _gates(self, segment: Segment, layer: int, step: int) -> Tensor:
        if not self._keep_gates:
            return self._gate_rows[0, : segment.num_rows]
        first = segment.first_gate + step * segment.num_rows
        return self._gate_rows[layer, first : first + segment.num_rows]
