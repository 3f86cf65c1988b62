"""A part that keeps state in its attributes: a replayed chunk reads the state of the forward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.core.habits.helpers import assert_close, gradients_of, inputs_of, processor_of, scalar, trained
from tests.core.habits.parts import OwnCarrier, filled


class Joined(NamedTuple):
    embedding: Tensor
    surface: Tensor


class Remembering(OwnCarrier):
    """Keeps a nested list of tensors that grows in every step, and adds its length."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"steps": [[torch.zeros(())]]}

    def forward(self, features: Tensor, energy: Tensor, hidden: Any) -> Any:
        self.seen["steps"][0].append(energy.detach().mean())
        decision, state = super().forward(features, energy, hidden)
        return decision + 0.01 * len(self.seen["steps"][0]), state


def test_a_replay_sees_the_lists_of_the_forward_pass() -> None:
    """Lists at any depth, as they were: a part that counts its steps in one has exact gradients in chunks."""
    processor = processor_of({"chunk": 1})
    processor.carrier = filled(Remembering())
    embedding, rows = inputs_of()
    loss = scalar(processor(embedding, rows))
    processor.carrier.seen["steps"][0].append(torch.ones(()))
    length = len(processor.carrier.seen["steps"][0])
    found = gradients_of(loss, trained(processor))
    assert len(processor.carrier.seen["steps"][0]) == length
    again = processor_of({"engine": "autograd", "chunk": 1})
    again.carrier = filled(Remembering())
    parts = [again(embedding[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    joined = scalar(Joined(torch.cat([part.embedding for part in parts]), torch.cat([part.surface for part in parts])))
    assert_close(found, gradients_of(joined, trained(again)))
