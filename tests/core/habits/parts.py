"""Neurons, carriers and wrappers of one's own, as a user would write them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.simple_neuron import SimpleNeuron
from tests.helpers import fill_parameters

FEATURES, ENERGY, HIDDEN = 4, 2, 5  # of the case in `helpers`


class OwnNeuron(nn.Module):
    """Features from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 + ENERGY, FEATURES)

    def forward(self, position: Tensor, energy: Tensor) -> Tensor:
        return torch.sin(self.layer(torch.cat([position, energy], -1)))


class OwnCarrier(nn.Module):
    """An Elman cell; its hidden state is one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(FEATURES + ENERGY, HIDDEN)
        self.recurrent = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, ENERGY + 3)

    def forward(self, features: Tensor, energy: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        value = self.inputs(torch.cat([features, energy], -1))
        state = torch.tanh(value if hidden is None else value + self.recurrent(hidden))
        return self.head(state), state


class MemorylessCarrier(nn.Module):
    """Two layers without a hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(FEATURES + ENERGY, 6), nn.Tanh(), nn.Linear(6, ENERGY + 3))

    def forward(self, features: Tensor, energy: Tensor, hidden: Any) -> tuple[Tensor, tuple[()]]:
        return self.network(torch.cat([features, energy], -1)), ()


class LSTMCarrier(nn.Module):
    """An LSTM cell; its hidden state is a dict of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES + ENERGY, HIDDEN)
        self.head = nn.Linear(HIDDEN, ENERGY + 3)

    def forward(
        self, features: Tensor, energy: Tensor, hidden: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value = torch.cat([features, energy], -1)
        before = None if hidden is None else (hidden["h"].flatten(0, 1), hidden["c"].flatten(0, 1))
        h, c = (part.unflatten(0, value.shape[:2]) for part in self.cell(value.flatten(0, 1), before))
        return self.head(h), {"h": h, "c": c}


class DoublingNeuron(SimpleNeuron):
    """A subclass that changes the result."""

    def forward(self, position: Tensor, energy: Tensor) -> Tensor:
        return 2 * super().forward(position, energy)


class DoublingCarrier(EnergyCarrier):
    """A subclass that changes its arguments."""

    def forward(self, features: Tensor, energy: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        return super().forward(2 * features, energy, hidden)


class Scaled(nn.Module):
    """A wrapper with a parameter; the first result is scaled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.full((), 0.9, dtype=torch.float64))

    def forward(self, *inputs: Any) -> Any:
        output = self.inner(*inputs)
        return (self.gain * output[0], *output[1:]) if isinstance(output, tuple) else self.gain * output


class LoRA(nn.Module):
    """A linear layer, frozen, with a low-rank term: base(x) + B A x."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(base.out_features, rank, dtype=torch.float64) * 0.1)

    def forward(self, value: Tensor) -> Tensor:
        return self.base(value) + value @ self.a.T @ self.b.T


class HalvedCell(nn.GRUCell):
    """A subclass of a layer that halves its result."""

    def forward(self, inputs: Tensor, hidden: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(inputs, hidden)


class HalvedLinear(nn.Linear):
    """The same for a linear layer."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * super().forward(inputs)


class Doubling(torch.Tensor):
    """A tensor subclass for which a linear layer doubles its result."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = super().__torch_function__(function, types, args, kwargs or {})
        if function is nn.functional.linear:
            return 2 * output.as_subclass(torch.Tensor)
        return output


def filled(part: nn.Module, seed: int = 5) -> nn.Module:
    """A float64 part with fixed weights."""
    part = part.double()
    fill_parameters(part, seed, displacement=0.8)
    return part


def with_weights_of(make: Callable[..., nn.Module], shipped: nn.Module, *arguments: int) -> nn.Module:
    """A subclass's module with the weights of a shipped one."""
    part = make(*arguments).double()
    part.load_state_dict(shipped.state_dict())
    return part
