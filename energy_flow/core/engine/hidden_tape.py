"""The hidden states of flows over all steps: the GRU's part of the tape, forward and backward.

The tape is one matrix. A slab of it has one row per flow slot, [x | h of layer 0 | ... | h of layer L - 1], and each
part is one step behind the part before it: slab s holds the input of step s, and the hidden state of layer l after
s - l steps. So the [x | h] that a layer reads is one range of columns, its values over all steps are one strided
matrix, and nothing is ever concatenated.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.engine.compiled import StepKernels
from energy_flow.core.engine.packed_weights import PackedGradients, PackedWeights
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.ops.backend import use_triton


@dataclass
class Segment:
    """Consecutive steps of one set of slots: a range of the tape's rows, n to a step."""

    number: int  # 0 for the first
    num_slots: int  # n
    first_slab: int  # row of the tape where its slabs start
    first_gate: int  # row of the gate buffer where its gates start
    steps: int = 0  # so far


class HiddenTape:
    """The hidden states of the slots of the current segment, and all that the backward pass needs of them.

    Args:
        weights: packed.
        kernels: compute what is between the matrix products.
        num_steps: T of the rollout.
        num_slots: slots of the first segment, the most that any may have.
        max_segments: the most segments that the tape may have.
        keep: keep everything for a backward pass.
        recompute: compute gates once more in the backward pass, instead of keeping them.
        pool: provides the buffers; another tape on the same pool overwrites this one.
    """

    def __init__(
        self,
        weights: PackedWeights,
        kernels: StepKernels,
        num_steps: int,
        num_slots: int,
        max_segments: int,
        keep: bool,
        recompute: bool,
        pool: TensorPool,
    ) -> None:
        layers, size = len(weights.layers), weights.hidden_size
        self._layers, self._kernels = weights.layers, kernels
        self._input_size, self._hidden_size = weights.input_size, size
        # Columns of [x | h] of each layer.
        starts = [0, *(self._input_size + layer * size for layer in range(layers - 1))]
        self._columns = [slice(start, self._input_size + (layer + 1) * size) for layer, start in enumerate(starts)]
        self._keep, self._keep_gates = keep, keep and not recompute
        # Without `keep`, steps run in a ring of slabs; a new segment starts in a ring of its own.
        self._ring = layers + 1
        slabs = num_steps + layers * max_segments if keep else self._ring * min(max_segments, 2)
        device, dtype = weights.head_weight.device, weights.layers[0].weight_hh.dtype
        self._slabs = pool.take("slabs", (slabs * num_slots, weights.row_size), dtype, device)
        on_triton = use_triton(self._slabs)
        # Triton kernels write the gates' gradients over the gates.
        self._all_at_once = self._keep_gates and on_triton
        gates = (layers, num_steps * num_slots, 4 * size) if self._keep_gates else (1, num_slots, 4 * size)
        self._gate_rows = pool.take("gates", gates, dtype, device)
        self._gates_backward = kernels.gates_backward
        if recompute and device.type == "cpu" and not on_triton:
            self._gates_backward = functools.partial(kernels.gates_backward, in_place=True)
        self.segment = Segment(0, num_slots, 0, 0)
        for layer in range(layers):
            self._hidden(self.segment, layer, 0).zero_()

    def input(self) -> Tensor:
        """The place for the next step's input, [n, X]. Write to it before `forward`."""
        return self._slab(self.segment, self.segment.steps)[:, : self._input_size]

    def forward(self, count: Tensor | None = None) -> Tensor:
        """One step of all layers.

        Args:
            count: int64 scalar: only so many leading slots are in use. The hidden states of the others stay finite.
                None: all.

        Returns:
            The last layer's hidden state [n, H], a view of the tape.
        """
        segment, step = self.segment, self.segment.steps
        for number, layer in enumerate(self._layers):
            gates, xh = self._gates(segment, number, step), self._xh(segment, number, step)
            layer.products(xh, gates, self._is_first(segment, step), count)
            next_hidden = self._hidden(segment, number, step + 1)
            self._kernels.gates_forward(gates, xh[:, -self._hidden_size :], layer.bias, next_hidden, count)
        segment.steps += 1
        return self.last_hidden(segment, step)

    def last_hidden(self, segment: Segment, step: int) -> Tensor:
        """The last layer's hidden state after a step of a segment, [n, H]."""
        return self._hidden(segment, len(self._layers) - 1, step + 1)

    def exchange(self, source: Tensor) -> None:
        """Give slot i the hidden states of slot source[i], int64 [n]."""
        for number in range(len(self._layers)):
            hidden = self._hidden(self.segment, number, self.segment.steps)
            hidden.copy_(hidden[source])

    def restart(self, source: Tensor) -> None:
        """Start a new segment whose slot i has the hidden states of slot source[i] of this one; int64 [new n]."""
        before = self.segment
        if self._keep:
            first_slab = before.first_slab + (before.steps + len(self._layers)) * before.num_slots
        else:
            first_slab = (before.number + 1) % 2 * (len(self._slabs) // 2)
        first_gate = before.first_gate + before.steps * before.num_slots
        self.segment = Segment(before.number + 1, len(source), first_slab, first_gate)
        for number in range(len(self._layers)):
            hidden = self._hidden(before, number, before.steps)
            torch.index_select(hidden, 0, source, out=self._hidden(self.segment, number, 0))

    def zero_gradients(self) -> list[Tensor]:
        """Zeros [n, H] for the hidden state of every layer in the last segment."""
        shape = (self.segment.num_slots, self._hidden_size)
        return [self._slabs.new_zeros(shape) for _ in self._layers]

    def backward(
        self,
        segment: Segment,
        step: int,
        grad_hidden: list[Tensor],
        gradients: PackedGradients,
        count: Tensor | None = None,
    ) -> Tensor:
        """The backward pass of one step. Steps must come in reverse order.

        Args:
            segment: of the step.
            step: its number in the segment.
            grad_hidden: L gradients [n, H] of the hidden states after the step; replaced by those before it.
            gradients: receives bias gradients, and weight gradients unless `add_weight_gradients` adds them.
            count: the step's; `grad_hidden` is 0 in the other slots.

        Returns:
            The gradient of the step's input, [n, X].
        """
        layers, first = self._layers, self._is_first(segment, step)
        for number in reversed(range(len(layers))):
            layer, sums = layers[number], gradients.layers[number]
            gates, xh = self._gates(segment, number, step), self._xh(segment, number, step)
            if not self._keep_gates:
                layer.products(xh, gates, first, count)
            grad_gates, grad_before = self._gates_backward(
                gates, xh[:, -self._hidden_size :], grad_hidden[number], layer.bias, sums.bias, count
            )
            grad_hidden[number] = grad_before
            if not first:  # the zero hidden state at the start needs no gradient
                layer.add_hidden_gradient(grad_gates, grad_before, count)
            if not self._all_at_once:
                sums.add(grad_gates, xh, len(xh) if first else 0)
            if number > 0:
                layer.add_input_gradient(grad_gates, grad_hidden[number - 1], count)
                del grad_gates  # large: free it before the next layer makes its own
        return layers[0].input_gradient(grad_gates, count)

    def add_weight_gradients(self, segment: Segment, gradients: PackedGradients) -> None:
        """Add the weight gradients of a segment, where `backward` hasn't: one product over all steps and flows."""
        if not self._all_at_once:
            return
        num_rows = segment.steps * segment.num_slots
        for number, sums in enumerate(gradients.layers):
            first_slab = segment.first_slab + number * segment.num_slots
            gates = self._gate_rows[number, segment.first_gate : segment.first_gate + num_rows]
            num_empty = segment.num_slots if self._is_first(segment, 0) else 0
            sums.add(gates, self._slabs[first_slab : first_slab + num_rows, self._columns[number]], num_empty)

    def _slab(self, segment: Segment, index: int) -> Tensor:
        first = segment.first_slab + (index if self._keep else index % self._ring) * segment.num_slots
        return self._slabs[first : first + segment.num_slots]

    @staticmethod
    def _is_first(segment: Segment, step: int) -> bool:
        """Whether it is the rollout's first step, before which all hidden states are 0."""
        return segment.number == 0 and step == 0

    def _xh(self, segment: Segment, layer: int, step: int) -> Tensor:
        """The operand of a layer in a step, [x | h] [n, X + H]."""
        return self._slab(segment, step + layer)[:, self._columns[layer]]

    def _hidden(self, segment: Segment, layer: int, steps: int) -> Tensor:
        """The hidden state of a layer after a number of steps, [n, H]."""
        last = self._columns[layer].stop
        return self._slab(segment, steps + layer)[:, last - self._hidden_size : last]

    def _gates(self, segment: Segment, layer: int, step: int) -> Tensor:
        if not self._keep_gates:
            return self._gate_rows[0, : segment.num_slots]
        first = segment.first_gate + step * segment.num_slots
        return self._gate_rows[layer, first : first + segment.num_slots]
