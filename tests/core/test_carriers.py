"""Carriers against the reference, PyTorch's LSTM and PyTorch's attention: values, gradients, shapes, dtypes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from energy_flow.core.carriers import AttentionCarrier, LSTMCarrier, MGUCarrier, MLPCarrier
from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.tensors import map_tensors, tensors_of
from energy_flow.errors import ConfigError
from tests.helpers import assert_near, fill_parameters
from tests.reference_parts import carrier_step

DTYPE = torch.float64
BATCH, SLOTS, FEATURES, ENERGIES, HIDDEN, STEPS = 2, 3, 4, 2, 6, 4
KINDS: dict[str, tuple[type[nn.Module], dict[str, int]]] = {
    "gru": (EnergyCarrier, {"num_layers": 2}),
    "lstm": (LSTMCarrier, {}),
    "lstm, two layers": (LSTMCarrier, {"num_layers": 2}),
    "mgu": (MGUCarrier, {}),
    "mgu, two layers": (MGUCarrier, {"num_layers": 2}),
    "mlp": (MLPCarrier, {}),
    "mlp, two layers": (MLPCarrier, {"num_layers": 2}),
    "attention": (AttentionCarrier, {"num_heads": 2}),
    "attention, one head": (AttentionCarrier, {"num_heads": 1}),
}
REMEMBERING = [name for name in KINDS if not name.startswith("mlp")]
every_kind = pytest.mark.parametrize("kind", KINDS)


def carrier_of(kind: str, **sizes: int) -> nn.Module:
    cls, arguments = KINDS[kind]
    sizes = {"features": FEATURES, "energy_dim": ENERGIES, "hidden_size": HIDDEN, **arguments, **sizes}
    carrier = cls(**sizes).double()
    fill_parameters(carrier, seed=1, displacement=1.0)
    return carrier


def inputs(steps: int = STEPS, batch: int = BATCH, slots: int = SLOTS) -> tuple[Tensor, Tensor]:
    """Features [T, B, M, F] and energies [T, B, M, E] of every step."""
    return torch.randn(steps, batch, slots, FEATURES, dtype=DTYPE), torch.randn(
        steps, batch, slots, ENERGIES, dtype=DTYPE
    )


def run(carrier: nn.Module, features: Tensor, energies: Tensor) -> Tensor:
    """Decisions of all steps, [T, B, M, E + 3]."""
    hidden, decisions = None, []
    for step_features, step_energies in zip(features, energies, strict=True):
        decision, hidden = carrier(step_features, step_energies, hidden)
        decisions.append(decision)
    return torch.stack(decisions)


def run_reference(carrier: nn.Module, features: Tensor, energies: Tensor) -> Tensor:
    decisions = torch.empty(*features.shape[:3], ENERGIES + 3, dtype=DTYPE)
    for sample in range(features.shape[1]):
        for slot in range(features.shape[2]):
            hidden = None
            for step in range(features.shape[0]):
                flow = features[step, sample, slot], energies[step, sample, slot]
                decisions[step, sample, slot], hidden = carrier_step(carrier, *flow, hidden)
    return decisions


def assert_same(actual: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients of all leaves for a random cotangent."""
    assert_near(actual, expected, 1e-13, "values")
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert other.abs().max() > 0
        assert_near(one, other, 1e-12, f"gradient {index}")


def leaves_of(carrier: nn.Module, *tensors: Tensor) -> list[Tensor]:
    return [*(tensor.requires_grad_() for tensor in tensors), *carrier.parameters()]


def layers_of(carrier: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    for name, module in carrier.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


@every_kind
def test_equals_the_reference(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs()
    leaves = leaves_of(carrier, features, energies)
    assert_same(run(carrier, features, energies), run_reference(carrier, features, energies), leaves)


@pytest.mark.parametrize("layers", [1, 2])
def test_lstm_equals_that_of_torch(layers: int) -> None:
    carrier, (features, energies) = carrier_of("lstm", num_layers=layers), inputs()
    lstm = nn.LSTM(FEATURES + ENERGIES, HIDDEN, layers, dtype=DTYPE)
    for layer, cell in enumerate(carrier.cells):
        for name, parameter in cell.named_parameters():
            setattr(lstm, f"{name}_l{layer}", parameter)
    leaves = leaves_of(carrier, features, energies)
    lstm.flatten_parameters()
    sequences = torch.cat([features, energies], dim=-1).flatten(1, 2)
    outputs = lstm(sequences)[0].unflatten(1, (BATCH, SLOTS))
    expected = torch.cat([carrier.energy_head(outputs), carrier.displacement_head(outputs)], dim=-1)
    assert_same(run(carrier, features, energies), expected, leaves)


def test_attention_equals_that_of_torch() -> None:
    """Over the stored past of every step, in one causal call."""
    carrier, (features, energies) = carrier_of("attention"), inputs()
    leaves = leaves_of(carrier, features, energies)
    x = carrier.embed(torch.cat([features, energies], dim=-1)).movedim(0, 2)  # [B, M, T, H]
    query, keys, values = (
        layer(x).unflatten(-1, (carrier.num_heads, -1)).transpose(-3, -2)
        for layer in (carrier.query, carrier.key, carrier.value)
    )
    attended = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    after = nn.functional.silu(x + carrier.output(attended.transpose(-3, -2).flatten(-2)))
    expected = torch.cat([carrier.energy_head(after), carrier.displacement_head(after)], dim=-1).movedim(2, 0)
    assert_same(run(carrier, features, energies), expected, leaves)


@every_kind
def test_gradcheck(kind: str) -> None:
    carrier = carrier_of(kind, hidden_size=2, features=1, energy_dim=1)
    features, energies = torch.randn(2, 1, 2, 1, dtype=DTYPE), torch.randn(2, 1, 2, 1, dtype=DTYPE)
    leaves = leaves_of(carrier, features, energies)
    assert gradcheck(lambda features, energies, *_: run(carrier, features, energies), leaves)


@every_kind
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs(steps=2)
    run(carrier, features, energies).sum().backward()
    for name, parameter in carrier.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@every_kind
def test_flows_and_samples_do_not_touch(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs()
    together = run(carrier, features, energies)
    for sample in range(BATCH):
        for slot in range(SLOTS):
            own = (slice(None), slice(sample, sample + 1), slice(slot, slot + 1))
            assert_near(run(carrier, features[own], energies[own]), together[own], 1e-14, "alone")


@every_kind
def test_shapes_of_hidden_states(kind: str) -> None:
    """Every tensor begins with [B, M], so that children can take the states of their parents."""
    carrier, (features, energies) = carrier_of(kind), inputs()
    hidden: Any = None
    for step in range(3):
        decision, hidden = carrier(features[step], energies[step], hidden)
        assert decision.shape == (BATCH, SLOTS, ENERGIES + 3)
        tensors = tensors_of(hidden)
        assert all(tensor.shape[:2] == (BATCH, SLOTS) for tensor in tensors)
        assert bool(tensors) == (kind in REMEMBERING)
        if kind.startswith("attention"):
            assert all(tensor.shape[2:] == (step + 1, HIDDEN) for tensor in tensors)


@pytest.mark.parametrize("kind", ["lstm, two layers", "mgu, two layers"])
def test_the_first_hidden_state_is_zero(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs()
    decision, hidden = carrier(features[0], energies[0], None)
    again, _ = carrier(features[0], energies[0], map_tensors(torch.zeros_like, hidden))
    assert torch.equal(decision, again)


@every_kind
def test_the_past_counts(kind: str) -> None:
    """The last decision depends on every step before it, unless the carrier has no memory; the first on none later."""
    carrier, (features, energies) = carrier_of(kind), inputs()
    decisions = run(carrier, features.requires_grad_(), energies)
    (last,) = torch.autograd.grad(decisions[-1].sum(), features, retain_graph=True)
    assert (last[:-1] != 0).any(-1).all() == (kind in REMEMBERING)
    assert (last[:-1] == 0).all() == (kind not in REMEMBERING)
    (first,) = torch.autograd.grad(decisions[0].sum(), features)
    assert (first[1:] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gru"])
def test_no_flows(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs(slots=0)
    assert run(carrier, features, energies).shape == (STEPS, BATCH, 0, ENERGIES + 3)


@every_kind
def test_autocast(kind: str) -> None:
    """Decisions stay in float32, near those without autocast; gradients are finite."""
    carrier = carrier_of(kind).float()
    features, energies = (tensor.float() for tensor in inputs())
    exact = run(carrier, features, energies)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        decisions = run(carrier, features, energies)
    assert decisions.dtype == torch.float32
    assert not torch.equal(decisions, exact)
    assert_near(decisions, exact, 0.05, "decisions under autocast")
    decisions.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in carrier.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gru"])
def test_layers_are_called_as_modules(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs(steps=1)
    called = []
    for name, layer in layers_of(carrier):
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    run(carrier, features, energies)
    assert sorted(called) == sorted(name for name, _ in layers_of(carrier))


class Doubled(nn.Module):
    """Wraps a layer, and has no `weight`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gru"])
def test_a_wrapped_head(kind: str) -> None:
    carrier, (features, energies) = carrier_of(kind), inputs()
    before = run(carrier, features, energies)
    carrier.energy_head = Doubled(carrier.energy_head)
    after = run(carrier, features, energies)
    assert torch.equal(after[..., :ENERGIES], 2 * before[..., :ENERGIES])
    assert torch.equal(after[..., ENERGIES:], before[..., ENERGIES:])


@pytest.mark.parametrize("heads", [0, 4])
def test_heads_must_share_the_hidden_size(heads: int) -> None:
    with pytest.raises(ConfigError) as error:
        carrier_of("attention", num_heads=heads)
    assert str(error.value) == (
        f"model.carrier.num_heads = {heads}: model.carrier.hidden_size = 6 must be a multiple of it. Set "
        "model.carrier.num_heads to 1, or to a divisor of model.carrier.hidden_size"
    )
