"""The protocols of a step's parts. Any module that keeps one of them can stand in the place of the shipped part.

Letters: B samples, M slots per sample, S = W * H cells, E energies, F features, D numbers of an embedding.

A part keeps three promises, and tests of the package check them for the shipped parts:

- Samples don't touch: row b of an output depends on row b of the inputs only. So no batch norm.
- State lives in the arguments, in parameters and in buffers. A chunk of samples may run a second time for the backward
  pass, with the same arguments, parameters, buffers and random numbers; state elsewhere would differ then.
- Randomness comes from torch's generators. They are put back before a chunk runs again.
"""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Neuron(Protocol):
    """Computes the features of all flows from what they carry; called in every step.

    A neuron with a method `sense` (see `SensingNeuron`) gets a third argument.
    """

    def __call__(self, position: Tensor, energy: Tensor) -> Tensor:
        """Positions [B, M, 3] in normalised units and energies [B, M, E] -> features [B, M, F]."""


@runtime_checkable
class SensingNeuron(Protocol):
    """A neuron that reads the input surface, or conditions of the batch, at the places of the flows."""

    def sense(self, surface: Tensor, context: dict[str, Tensor]) -> Any:
        """Prepare a rollout; called once per batch, with gradients.

        Args:
            surface: [B, S, E], the energies of the input plane; cell (x, y) is entry y * W + x.
            context: further inputs of the batch by name, each [B, ...]. Empty if the batch has none.

        Returns:
            A tensor [B, ...], or a tuple, dict or dataclass of such tensors: the third argument of every step.
        """

    def __call__(self, position: Tensor, energy: Tensor, sensed: Any) -> Tensor:
        """Positions [B, M, 3], energies [B, M, E], and the result of `sense` -> features [B, M, F]."""


class Carrier(Protocol):
    """Decides from features, energy and its hidden state where a flow goes, and how its energy changes."""

    def __call__(self, features: Tensor, energy: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        """One step of all flows.

        Args:
            features: [B, M, F].
            energy: [B, M, E].
            hidden: the hidden state of the step before; None in the first step.

        Returns:
            The decision [B, M, E + 3], the change of energy first, then the direction; and the next hidden state: a
            tensor [B, M, ...], or a tuple, list or dict of such tensors (empty for a carrier without memory). Children
            start with the hidden states of their parents.
        """


class Aggregation(Protocol):
    """Computes the energies of the output surface from the landings of every cell."""

    def __call__(
        self, scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bound: float | None
    ) -> tuple[Tensor, Tensor]:
        """Aggregate N landings with K deposits each.

        Args:
            scores: [N], see `landing_score`.
            values: energies [N, E].
            keys: int64 [N, K], the group of every deposit: sample * S + cell.
            weights: [N, K], 0 for slots without a landing.
            num_groups: B * S.
            bound: the largest score that a landing can have, where one is known.

        Returns:
            The energies of all groups [B * S, E], and their mass [B * S], the sum of the weights.
        """
