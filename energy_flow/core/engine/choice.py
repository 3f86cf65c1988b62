"""Which engine may run a rollout: the tape only where every part is exactly one that its kernels know."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from energy_flow.core.energy_carrier import EnergyCarrier, GRUCell
from energy_flow.core.energy_lattice import EnergyLattice
from energy_flow.core.simple_neuron import SimpleNeuron

_CELL = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
# The classes that the tape's kernels replace, with their parameters. Subclasses don't count.
_KNOWN: dict[type[nn.Module], set[str]] = {
    SimpleNeuron: set(),
    EnergyCarrier: set(),
    EnergyLattice: set(),
    nn.Sequential: set(),
    nn.ModuleList: set(),
    nn.SiLU: set(),
    nn.Linear: {"weight", "bias"},
    nn.GRUCell: _CELL,
    GRUCell: _CELL,
}
# Their own methods, as they are when this module is imported.
_METHODS = [(kind, name, method) for kind in _KNOWN for name, method in vars(kind).items() if callable(method)]
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


def tape_obstacle(neuron: nn.Module, carrier: nn.Module, lattice: nn.Module, surface: Tensor) -> str | None:
    """Why the tape can't run these parts as they are now; None if it can.

    Args:
        neuron, carrier, lattice: of the processor.
        surface: the input surface, for its type and device.
    """
    found = _traced(surface) or _kinds(neuron, carrier, lattice)
    if found is not None:
        return found
    names = {"neuron": neuron, "carrier": carrier}
    parts = [(f"{top}.{name}".rstrip("."), part) for top, one in names.items() for name, part in one.named_modules()]
    for name, part in [*parts, ("lattice", lattice)]:
        reason = _changed(part)
        if reason is not None:
            return f"processor.{name} {reason}"
    replaced = next(
        (f"{kind.__name__}.{name}" for kind, name, method in _METHODS if vars(kind).get(name) is not method), None
    )
    if replaced is not None:
        return f"{replaced} was replaced"
    return _unlike_sizes(neuron, carrier) or _mixed(neuron, carrier, surface)


def has_hook(part: nn.Module) -> str | None:
    """The kind of the first hook of a module itself, or of all modules; None: there is none."""
    for attribute, hook in _HOOKS.items():
        if getattr(part, attribute):
            return hook
        if getattr(torch_module, f"_global{attribute}", None):
            return f"{hook} for all modules"
    return None


def _traced(surface: Tensor) -> str | None:
    """Whether something runs the code with stand-ins for tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the call"
    if torch.compiler.is_exporting():
        return "torch.export traces the call"
    if type(surface) not in (Tensor, FakeTensor) or surface.is_meta:
        return f"the input is a {type(surface).__name__} on the device {surface.device.type}"
    return None


def _kinds(neuron: nn.Module, carrier: nn.Module, lattice: nn.Module) -> str | None:
    """The first part that isn't exactly of the shipped kind."""
    for name, part, kind in _expected(neuron, carrier, lattice):
        if type(part) not in (kind if isinstance(kind, tuple) else (kind,)):
            return f"processor.{name} is of the class {_name(part)}"
    return None


def _expected(neuron: nn.Module, carrier: nn.Module, lattice: nn.Module) -> Iterator[tuple[str, object, object]]:
    """Names of parts, the parts, and the classes that they may have. A part is only reached if its owner is right."""
    yield "lattice", lattice, EnergyLattice
    yield "neuron", neuron, SimpleNeuron
    network = getattr(neuron, "network", None)
    yield "neuron.network", network, nn.Sequential
    kinds = (nn.Linear, nn.SiLU, nn.Linear)
    layers = list(network._modules.values()) if isinstance(network, nn.Module) else []  # tied ones twice
    for index, kind in enumerate(kinds):
        yield f"neuron.network.{index}", layers[index] if len(layers) == len(kinds) else None, kind
    yield "carrier", carrier, EnergyCarrier
    cells = getattr(carrier, "cells", None)
    yield "carrier.cells", cells, nn.ModuleList
    for index, cell in enumerate(cells if isinstance(cells, nn.ModuleList) else ()):
        yield f"carrier.cells.{index}", cell, (GRUCell, nn.GRUCell)
    for head in ("energy_head", "displacement_head"):
        yield f"carrier.{head}", getattr(carrier, head, None), nn.Linear


def _changed(part: nn.Module) -> str | None:
    """How a part of a known kind was changed."""
    hook = has_hook(part)
    if hook is not None:
        return f"has {hook}"
    kind, own = type(part), vars(part)
    patched = [name for name in own if callable(getattr(kind, name, None))]
    if patched:
        return f"has a {patched[0]} of its own"
    names = {name for name, value in part._parameters.items() if value is not None}
    if names != _KNOWN.get(kind, set()):
        return f"has the parameters {', '.join(sorted(names)) or 'none'} instead of {', '.join(sorted(_KNOWN[kind]))}"
    for name, value in part._parameters.items():
        if type(value) not in (nn.Parameter, Tensor) or name in own:
            return f"has a {type(value).__name__} as its {name}"
    return None


def _unlike_sizes(neuron: nn.Module, carrier: nn.Module) -> str | None:
    """Sizes that only the modules themselves can explain."""
    neuron, carrier = cast(SimpleNeuron, neuron), cast(EnergyCarrier, carrier)
    first, second = cast(nn.Linear, neuron.network[0]), cast(nn.Linear, neuron.network[2])
    energy, direction = carrier.energy_head, carrier.displacement_head
    size, features, energy_dim = carrier.hidden_size, second.weight.shape[0], energy.weight.shape[0]
    wanted = [(features + energy_dim, size)] + [(size, size)] * (len(carrier.cells) - 1)
    cells = [(cell.weight_ih.shape[1], cell.weight_hh.shape[1]) for cell in cast(list[nn.GRUCell], carrier.cells)]
    fits = (
        cells == wanted
        and all(_is_whole(layer) for layer in (first, second, energy, direction, *carrier.cells))
        and energy.weight.shape[1] == size
        and direction.weight.shape == (3, size)
        and first.weight.shape[1] == 3 + energy_dim
        and second.weight.shape[1] == first.weight.shape[0]
    )
    return None if fits else "the sizes of processor.neuron and processor.carrier don't fit together"


def _is_whole(layer: nn.Module) -> bool:
    """Whether the weights of a layer have the sizes that the layer says."""
    if isinstance(layer, nn.Linear):
        outputs = layer.out_features
        return layer.weight.shape == (outputs, layer.in_features) and layer.bias.shape == (outputs,)
    assert isinstance(layer, nn.GRUCell)
    gates, size = 3 * layer.hidden_size, layer.hidden_size
    inputs = layer.weight_ih.shape == (gates, layer.input_size)
    return inputs and layer.weight_hh.shape == (gates, size) and layer.bias_ih.shape == layer.bias_hh.shape == (gates,)


def _mixed(neuron: nn.Module, carrier: nn.Module, surface: Tensor) -> str | None:
    """Parameters of several dtypes or devices."""
    values = [*neuron.parameters(), *carrier.parameters()]
    kinds = {(value.dtype, value.device) for value in values} | {(surface.dtype, surface.device)}
    if len(kinds) == 1:
        return None
    listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
    return f"parameters and input surface have several dtypes or devices ({listed})"


def _name(part: object) -> str:
    kind = type(part)
    return kind.__qualname__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__qualname__}"
