"""The tape: what all steps of a chunk leave for the backward pass, and the walk back.

Flows that have ended can be left out (compaction): then a step computes some of the slots only, its `rows`, or of all
slots in another order the first few, whose number only the device knows.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from energy_flow.core.engine.compiled import StepKernels
from energy_flow.core.engine.hidden_tape import MemoryTape, Segment
from energy_flow.core.engine.packed_weights import StepGradients, StepWeights
from energy_flow.core.flow_step import MoveRule, StepResult, flow_step
from energy_flow.core.tensorized_flow_storage import Births, FlowState, TensorPool

# Flows that have ended are computed; left out, by rows that the host counts; left out, by a count on the device.
Compaction = Literal["none", "rows", "counts"]

_FEW = 7 / 8  # share of the rows below which going on with the active ones alone is worth the copy
_PERIOD = 5  # steps after which rows are sorted by a count on the device; no other period was measured


@dataclass
class StepRecord:
    """What the way back through one step needs beside the memories; n rows of it."""

    segment: Segment
    index: int  # of the step in its segment
    rows: Tensor | None  # int64 [n], which of the B * M slots; None: all of them
    count: Tensor | None  # int64 scalar: so many of the rows, the first ones, are in use; None: all of them
    source: Tensor | None  # int64 [n]: rows that memories were taken over from before this step
    inherits: bool  # some of them by several: by children
    rows_before: int  # rows of the step before
    position: Tensor
    energy: Tensor
    active: Tensor
    noise: Tensor | None
    decision: Tensor
    next_energy: Tensor
    births: Births | None = None  # after this step


def most_segments(num_steps: int, compaction: Compaction, spawning: bool) -> int:
    """How many segments a tape may have: a new one whenever flows that have ended drop out, and with rows that the host
    counts before any step in which children need some."""
    if compaction == "none":
        return 1
    if compaction == "counts":
        return -(-num_steps // _PERIOD)
    return 1 + (num_steps if spawning else min(num_steps, math.ceil(1 / (1 - _FEW))))


class Tape:
    """Steps of one chunk of samples: a `Stepper`, and the `Networks` of its steps.

    Args:
        weights: packed.
        rule: how flows move.
        num_steps: T.
        num_slots: B * M of the chunk.
        keep: for a backward pass.
        recompute: gates in the backward pass, instead of keeping them.
        compaction: whether and how to leave out flows that have ended. "rows" asks the device how many they are: for
            CPUs.
        spawning: whether children may be born after any step.
        pool: of the buffers; another tape on it overwrites this one.
    """

    def __init__(
        self,
        weights: StepWeights,
        functions: StepKernels,
        rule: MoveRule,
        num_steps: int,
        num_slots: int,
        keep: bool,
        recompute: bool,
        compaction: Compaction,
        spawning: bool,
        pool: TensorPool,
    ) -> None:
        self.weights, self._functions, self._rule = weights, functions, rule
        self.draw_noise = functions.counter_noise
        self._keep, self._compaction = keep, compaction
        max_segments = most_segments(num_steps, compaction, spawning)
        self._memory = MemoryTape(weights, functions, num_steps, num_slots, max_segments, keep, recompute, pool)
        self._num_steps = 0  # so far
        self._rows: Tensor | None = None
        self._count: Tensor | None = None
        self._source: Tensor | None = None  # slots to take memories over from, before the next step
        self._records: list[StepRecord] = []

    def step(self, state: FlowState, active: Tensor, noise: Tensor | None) -> StepResult:
        """See `Stepper`."""
        rows_before, inherits = self._memory.segment.num_rows, self._source is not None
        source = self._take_over(active)
        rows = self._rows
        position, energy = state.position.reshape(-1, 3), state.energy.flatten(0, 1)
        moves = _pick(active.flatten(), rows)
        own_noise = None if noise is None else _pick(noise.reshape(-1, 3), rows)
        before = _pick(position, rows), _pick(energy, rows)
        segment, index = self._memory.segment, self._memory.segment.steps
        result = flow_step(self, *before, moves, own_noise, self._rule, self._functions.move)
        if self._keep:
            record = StepRecord(
                segment,
                index,
                rows,
                self._count,
                source,
                inherits,
                rows_before,
                *before,
                moves,
                own_noise,
                result.decision,
                result.energy,
            )
            self._records.append(record)
        self._num_steps += 1
        return StepResult(
            _put(position, rows, result.position).view_as(state.position),
            _put(energy, rows, result.energy).view_as(state.energy),
            _spread(result.length, rows, len(position)).view_as(active),
            _spread(result.reached, rows, len(position)).view_as(active),
            result.decision,
        )

    def inherit(self, births: Births) -> None:
        """See `Stepper`."""
        self._source = births.source()
        if self._keep:
            self._records[-1].births = births

    def read(self, position: Tensor, energy: Tensor) -> Tensor:
        """See `Networks`."""
        into = self._memory.input()
        self._functions.write_features(position, energy, *self.weights.neuron, into)
        return into

    def remember(self, read: Tensor) -> Tensor:
        """See `Networks`; `read` is on the tape already."""
        return self._memory.forward(self._count)

    def decide(self, memory: Tensor) -> Tensor:
        """See `Networks`."""
        return self._functions.heads_forward(memory, self.weights.head_weight, self.weights.head_bias)

    def backward(self, grad_position: Tensor, grad_energy: Tensor, gradients: StepGradients) -> Tensor:
        """Walk the tape in reverse, once: gates are overwritten by their gradients.

        Args:
            grad_position, grad_energy: [B, M, 3] and [B, M, E], of the flows after the last step.
            gradients: where the weights' gradients are added.

        Returns:
            Gradient of the energies that the flows started with, [B, M, E].
        """
        grad_memory = self._memory.no_gradients()
        for record in reversed(self._records):
            grad_birthplace = None
            if record.births is not None:
                grad_position, grad_birthplace = record.births.bequeath(grad_position)
                grad_energy = torch.add(*record.births.bequeath(grad_energy))
            grad_position, grad_energy = self._step_backward(record, grad_position, grad_energy, grad_memory, gradients)
            if grad_birthplace is not None:
                grad_position = grad_position + grad_birthplace
            if record.index == 0:
                self._memory.add_weight_gradients(record.segment, gradients)
            if record.source is not None:
                grad_memory = [_give_back(grad, record) for grad in grad_memory]
        return grad_energy

    def _step_backward(
        self,
        record: StepRecord,
        grad_position: Tensor,
        grad_energy: Tensor,
        grad_memory: list[Tensor],
        gradients: StepGradients,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of position and energy before a step; `grad_memory` is changed in place."""
        shapes, rows = (grad_position.shape, grad_energy.shape), record.rows
        on_position, on_energy = grad_position.reshape(-1, 3), grad_energy.flatten(0, 1)
        own_position, own_energy, grad_decision = self._functions.move_backward(
            record.position,
            record.next_energy,
            record.active,
            record.decision,
            record.noise,
            *self._rule,
            _pick(on_position, rows),
            _pick(on_energy, rows),
        )
        self._functions.heads_backward(
            grad_decision,
            self._memory.top(record.segment, record.index),
            self.weights.head_weight,
            grad_memory[-1],
            gradients.head_weight,
            gradients.head_bias,
        )
        grad_read = self._memory.backward(record.segment, record.index, grad_memory, gradients, record.count)
        features = self.weights.num_features
        weight1, bias1, weight2, _ = self.weights.neuron
        read_position, read_energy, *neuron = self._functions.features_backward(
            record.position, record.energy, weight1, bias1, weight2, grad_read[:, :features].to(weight1.dtype)
        )
        gradients.add_neuron(neuron)
        own_position = own_position + read_position
        own_energy = own_energy + read_energy + grad_read[:, features : features + own_energy.shape[1]]
        return _put(on_position, rows, own_position).view(shapes[0]), _put(on_energy, rows, own_energy).view(shapes[1])

    def _take_over(self, active: Tensor) -> Tensor | None:
        """Before a step: children take over memories, flows that have ended drop out; returns the rows' sources."""
        source, self._source = self._source, None
        if self._compaction == "rows":
            source = self._with_active_only(active.flatten(), source)
        elif self._compaction == "counts":
            source = self._with_active_first(active.flatten(), source)
        elif source is not None:
            self._memory.exchange(source)
        return source

    def _with_active_only(self, active: Tensor, source: Tensor | None) -> Tensor | None:
        """Go on with active flows alone, where that pays or new ones need rows."""
        num_rows = self._memory.segment.num_rows
        if source is None and int(active.sum()) >= _FEW * num_rows:
            return None
        rows = active.nonzero().flatten()
        slots = rows if source is None else source[rows]
        if self._rows is not None:
            slots = _inverse(self._rows, len(active))[slots]
        self._memory.restart(slots)
        self._rows = rows
        return slots

    def _with_active_first(self, active: Tensor, source: Tensor | None) -> Tensor | None:
        """Sort the rows in use to the front, and count them; what isn't in use is computed by nobody, or for nothing.

        Every few steps flows that have ended drop out, in a new segment. Children in between take rows behind those in
        use, which stay where they are: what the tape holds of earlier steps is still in its place.
        """
        anew = self._num_steps % _PERIOD == 0
        if not anew and source is None:
            return None
        rows = torch.arange(len(active), device=active.device) if self._rows is None else self._rows
        used = active[rows]
        if not anew:
            assert self._count is not None, "rows were sorted before the first step"
            used |= torch.arange(len(rows), device=rows.device) < self._count
        self._count = used.sum()
        self._rows = rows[used.argsort(descending=True, stable=True)]
        if self._num_steps == 0:  # nobody remembers anything
            return None
        slots = self._rows if source is None else source[self._rows]
        places = _inverse(rows, len(rows))[slots]
        if anew:
            self._memory.restart(places)
        else:
            self._memory.exchange(places)
        return places


def _inverse(rows: Tensor, num_slots: int) -> Tensor:
    """Which row a slot is, [num_slots]; anything for slots that are none."""
    place = torch.empty(num_slots, dtype=torch.int64, device=rows.device)
    return place.scatter_(0, rows, torch.arange(len(rows), device=rows.device))


def _pick(values: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of all slots' values."""
    return values if rows is None else values[rows]


def _put(values: Tensor, rows: Tensor | None, into: Tensor) -> Tensor:
    """All slots' values with those of `rows` replaced."""
    return into if rows is None else values.index_copy(0, rows, into)


def _spread(values: Tensor, rows: Tensor | None, num_slots: int) -> Tensor:
    """Values of `rows` among all slots, 0 elsewhere."""
    return values if rows is None else values.new_zeros(num_slots).index_copy(0, rows, values)


def _give_back(gradient: Tensor, record: StepRecord) -> Tensor:
    """The way back of memories [n, H] taken over before a step."""
    assert record.source is not None
    before = gradient.new_zeros(record.rows_before, gradient.shape[1])
    if record.inherits:
        return before.index_add_(0, record.source, gradient)
    return before.index_copy_(0, record.source, gradient)  # nothing is added: no atomics
