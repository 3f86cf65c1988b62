"""The tape: everything that the steps of a chunk leave for the backward pass, and that backward pass.

With compaction, a step doesn't compute flows that have ended. Then the tape has its own list of slots: it computes
`slots` of all B * M slots, or, with a count that only the device knows, the first `count` of these.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from energy_flow.core.engine.compiled import StepKernels
from energy_flow.core.engine.hidden_tape import HiddenTape, Segment
from energy_flow.core.engine.packed_weights import PackedGradients, PackedWeights
from energy_flow.core.flow_step import MoveRule, StepResult
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensorized_flow_storage import Births, FlowState

# none: compute ended flows too. active_only: keep the active slots, whose number the host waits for (for CPUs).
# active_first: sort the active slots to the front, and count them on the device.
Compaction = Literal["none", "active_only", "active_first"]

_FEW = 7 / 8  # share of active slots below which dropping the others is worth the copy
_PERIOD = 5  # steps between two sorts with "active_first"; no other period was measured


@dataclass
class StepRecord:
    """Everything that the backward pass of one step needs besides the hidden states; n slots."""

    segment: Segment
    index: int  # of the step in its segment
    slots: Tensor | None  # int64 [n], which of the B * M slots; None: all of them
    count: Tensor | None  # int64 scalar: only so many leading slots are in use; None: all
    source: Tensor | None  # int64 [n]: slots of the step before whose hidden states these slots took over
    has_children: bool  # several slots may have taken over from the same one
    slots_before: int  # n of the step before
    position: Tensor
    energy: Tensor
    active: Tensor
    noise: Tensor | None
    decision: Tensor
    next_energy: Tensor
    births: Births | None = None  # after this step


def most_segments(num_steps: int, compaction: Compaction, spawning: bool) -> int:
    """The most segments that a tape may need.

    A segment starts whenever ended flows drop out. With "active_only" one also starts before any step in which
    children need slots.
    """
    if compaction == "none":
        return 1
    if compaction == "active_first":
        return -(-num_steps // _PERIOD)
    return 1 + (num_steps if spawning else min(num_steps, math.ceil(1 / (1 - _FEW))))


class Tape:
    """A `Stepper` that records the steps of one chunk of samples, and computes their gradients.

    Args:
        weights: packed.
        kernels: compute what is between the matrix products.
        rule: how flows move.
        num_steps: T.
        num_slots: B * M of the chunk.
        keep: keep everything for a backward pass.
        recompute: compute gates once more in the backward pass, instead of keeping them.
        compaction: whether and how to skip flows that have ended.
        spawning: whether children may be born after a step.
        pool: provides the buffers; another tape on the same pool overwrites this one.
    """

    def __init__(
        self,
        weights: PackedWeights,
        kernels: StepKernels,
        rule: MoveRule,
        num_steps: int,
        num_slots: int,
        keep: bool,
        recompute: bool,
        compaction: Compaction,
        spawning: bool,
        pool: TensorPool,
    ) -> None:
        self.weights, self._kernels, self._rule = weights, kernels, rule
        self.draw_noise = kernels.counter_noise
        self._keep, self._compaction = keep, compaction
        self._hidden = HiddenTape(
            weights,
            kernels,
            num_steps=num_steps,
            num_slots=num_slots,
            max_segments=most_segments(num_steps, compaction, spawning),
            keep=keep,
            recompute=recompute,
            pool=pool,
        )
        self._num_steps = 0  # so far
        self._slots: Tensor | None = None
        self._count: Tensor | None = None
        self._source: Tensor | None = None  # slots to take hidden states from, before the next step
        self._records: list[StepRecord] = []

    def step(self, state: FlowState, active: Tensor, noise: Tensor | None) -> StepResult:
        """See `Stepper`."""
        slots_before, has_children = self._hidden.segment.num_slots, self._source is not None
        source = self._update_slots(active)
        slots = self._slots
        all_positions, all_energies = state.position.reshape(-1, 3), state.energy.flatten(0, 1)
        position, energy = _pick(all_positions, slots), _pick(all_energies, slots)
        moves = _pick(active.flatten(), slots)
        own_noise = None if noise is None else _pick(noise.reshape(-1, 3), slots)
        segment, index = self._hidden.segment, self._hidden.segment.steps
        self._kernels.write_features(position, energy, *self.weights.neuron, self._hidden.input())
        hidden = self._hidden.forward(self._count)
        decision = self._kernels.heads_forward(hidden, self.weights.head_weight, self.weights.head_bias)
        new_position, new_energy, length, reached = self._kernels.move(
            position, energy, moves, decision, own_noise, *self._rule
        )
        if self._keep:
            record = StepRecord(
                segment=segment,
                index=index,
                slots=slots,
                count=self._count,
                source=source,
                has_children=has_children,
                slots_before=slots_before,
                position=position,
                energy=energy,
                active=moves,
                noise=own_noise,
                decision=decision,
                next_energy=new_energy,
            )
            self._records.append(record)
        self._num_steps += 1
        num_slots = len(all_positions)
        return StepResult(
            position=_put(all_positions, slots, new_position).view_as(state.position),
            energy=_put(all_energies, slots, new_energy).view_as(state.energy),
            length=_spread(length, slots, num_slots).view_as(active),
            reached=_spread(reached, slots, num_slots).view_as(active),
            decision=decision,
        )

    def give_birth(self, births: Births) -> None:
        """See `Stepper`."""
        self._source = births.source()
        if self._keep:
            self._records[-1].births = births

    def backward(self, grad_position: Tensor, grad_energy: Tensor, gradients: PackedGradients) -> Tensor:
        """The backward pass of all steps. It runs once: it overwrites gates by their gradients.

        Args:
            grad_position, grad_energy: [B, M, 3] and [B, M, E], of the flows after the last step.
            gradients: receives the gradients of the weights.

        Returns:
            The gradient of the flows' energies at the start, [B, M, E].
        """
        grad_hidden = self._hidden.zero_gradients()
        for record in reversed(self._records):
            grad_birthplace = None
            if record.births is not None:
                grad_position, grad_birthplace = record.births.scatter_to_parents(grad_position)
                grad_energy = torch.add(*record.births.scatter_to_parents(grad_energy))
            grad_position, grad_energy = self._step_backward(record, grad_position, grad_energy, grad_hidden, gradients)
            if grad_birthplace is not None:
                grad_position = grad_position + grad_birthplace
            if record.index == 0:
                self._hidden.add_weight_gradients(record.segment, gradients)
            if record.source is not None:
                grad_hidden = [_scatter_to_source(grad, record) for grad in grad_hidden]
        return grad_energy

    def _step_backward(
        self,
        record: StepRecord,
        grad_position: Tensor,
        grad_energy: Tensor,
        grad_hidden: list[Tensor],
        gradients: PackedGradients,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of position and energy before a step; updates `grad_hidden` in place."""
        slots, kernels = record.slots, self._kernels
        all_positions, all_energies = grad_position.reshape(-1, 3), grad_energy.flatten(0, 1)
        own_position, own_energy, grad_decision = kernels.move_backward(
            record.position,
            record.next_energy,
            record.active,
            record.decision,
            record.noise,
            *self._rule,
            _pick(all_positions, slots),
            _pick(all_energies, slots),
        )
        kernels.heads_backward(
            grad_decision,
            self._hidden.last_hidden(record.segment, record.index),
            self.weights.head_weight,
            grad_hidden[-1],
            gradients.head_weight,
            gradients.head_bias,
        )
        grad_input = self._hidden.backward(record.segment, record.index, grad_hidden, gradients, record.count)
        features = self.weights.num_features
        weight1, bias1, weight2, _ = self.weights.neuron
        from_position, from_energy, *neuron = kernels.features_backward(
            record.position, record.energy, weight1, bias1, weight2, grad_input[:, :features].to(weight1.dtype)
        )
        gradients.add_neuron(neuron)
        own_position = own_position + from_position
        own_energy = own_energy + from_energy + grad_input[:, features : features + own_energy.shape[1]]
        return (
            _put(all_positions, slots, own_position).view_as(grad_position),
            _put(all_energies, slots, own_energy).view_as(grad_energy),
        )

    def _update_slots(self, active: Tensor) -> Tensor | None:
        """Before a step: give children their hidden states, drop ended flows; returns the `source` of the record."""
        source, self._source = self._source, None
        if self._compaction == "active_only":
            source = self._with_active_only(active.flatten(), source)
        elif self._compaction == "active_first":
            source = self._with_active_first(active.flatten(), source)
        elif source is not None:
            self._hidden.exchange(source)
        return source

    def _with_active_only(self, active: Tensor, source: Tensor | None) -> Tensor | None:
        """Go on with the active slots alone, where that pays or children need slots."""
        if source is None and int(active.sum()) >= _FEW * self._hidden.segment.num_slots:
            return None
        slots = active.nonzero().flatten()
        places = slots if source is None else source[slots]
        if self._slots is not None:
            places = _inverse(self._slots, len(active))[places]
        self._hidden.restart(places)
        self._slots = slots
        return places

    def _with_active_first(self, active: Tensor, source: Tensor | None) -> Tensor | None:
        """Sort the slots in use to the front and count them. The others are skipped, or computed for nothing.

        Ended flows drop out every few steps, in a new segment. Children that are born in between take places behind
        the slots in use, which don't move: the tape finds the values of earlier steps where they were.
        """
        anew = self._num_steps % _PERIOD == 0
        if not anew and source is None:
            return None
        slots = torch.arange(len(active), device=active.device) if self._slots is None else self._slots
        used = active[slots]
        if not anew:
            assert self._count is not None, "slots are sorted before the first step"
            used |= torch.arange(len(slots), device=slots.device) < self._count
        self._count = used.sum()
        self._slots = slots[used.argsort(descending=True, stable=True)]
        if self._num_steps == 0:  # all hidden states are 0
            return None
        places = _inverse(slots, len(slots))[self._slots if source is None else source[self._slots]]
        if anew:
            self._hidden.restart(places)
        else:
            self._hidden.exchange(places)
        return places


def _inverse(slots: Tensor, num_slots: int) -> Tensor:
    """The place of each slot in the list `slots`, int64 [num_slots]; arbitrary for slots that aren't in it."""
    place = torch.empty(num_slots, dtype=torch.int64, device=slots.device)
    return place.scatter_(0, slots, torch.arange(len(slots), device=slots.device))


def _pick(values: Tensor, slots: Tensor | None) -> Tensor:
    """The values of `slots`."""
    return values if slots is None else values[slots]


def _put(values: Tensor, slots: Tensor | None, new: Tensor) -> Tensor:
    """The values of all slots, with those of `slots` replaced."""
    return new if slots is None else values.index_copy(0, slots, new)


def _spread(values: Tensor, slots: Tensor | None, num_slots: int) -> Tensor:
    """The values of `slots` among all slots, 0 elsewhere."""
    return values if slots is None else values.new_zeros(num_slots).index_copy(0, slots, values)


def _scatter_to_source(gradient: Tensor, record: StepRecord) -> Tensor:
    """The backward pass of taking over hidden states [n, H] before a step."""
    assert record.source is not None
    before = gradient.new_zeros(record.slots_before, gradient.shape[1])
    if record.has_children:
        return before.index_add_(0, record.source, gradient)
    return before.index_copy_(0, record.source, gradient)  # no sums, so no atomics
