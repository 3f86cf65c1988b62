"""The state of modules at one moment, and a way to put it back for a while."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """The state of modules: copies of their tensors and generators, and which other attributes they had.

    A tensor that stands in several places, such as a tied weight, is copied once. A copy needs a gradient where its
    original does, so autograd saves the same tensors with either. Lists, tuples, dicts and sets are
    copied; other objects, such as a deque, are shared.

    Args:
        modules: with all their submodules.
        parameters: a snapshot of the same modules that shares its copies of parameters. Other state is copied anew.
    """

    def __init__(self, modules: tuple[nn.Module, ...], parameters: "Snapshot | None" = None) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._attributes = [(part, {name: _shallow(value) for name, value in vars(part).items()}) for part in parts]
        own = [value for part in parts for value in part._parameters.values() if value is not None]
        self._parameters: dict[int, Tensor] = (
            {id(value): _copy(value) for value in own} if parameters is None else parameters._parameters
        )
        self._state = {
            id(value): _copy(value)
            for _, attributes in self._attributes
            for value in _leaves(attributes)
            if id(value) not in self._parameters
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Give the modules the state of the snapshot; afterwards they have their own again. It can be repeated."""
        # A run may change buffers: it gets copies of the copies.
        copies = self._parameters | {key: _copy(value) for key, value in self._state.items()}
        before = [dict(vars(part)) for part, _ in self._attributes]
        try:
            for part, attributes in self._attributes:
                _set_attributes(part, {name: _substitute(value, copies) for name, value in attributes.items()})
            yield
        finally:
            for (part, _), attributes in zip(self._attributes, before, strict=True):
                _set_attributes(part, attributes)


def _set_attributes(part: nn.Module, attributes: dict[str, Any]) -> None:
    own = vars(part)
    for name in own.keys() - attributes.keys():
        del own[name]
    own.update(attributes)


def _shallow(value: Any) -> Any:
    """Containers of their own, at any depth, for the same entries."""
    if type(value) in (list, tuple):
        return type(value)(_shallow(entry) for entry in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, _shallow(entry)) for name, entry in value.items())
    return set(value) if type(value) is set else value


def _leaves(value: Any) -> Iterator[Tensor | torch.Generator]:
    """The tensors and generators in a value, or in containers of it."""
    if isinstance(value, Tensor | torch.Generator):
        yield value
    elif type(value) in (list, tuple):
        for entry in value:
            yield from _leaves(entry)
    elif type(value) in (dict, OrderedDict):
        yield from _leaves(list(value.values()))


def _substitute(value: Any, copies: dict[int, Any]) -> Any:
    """A value with the copies of its tensors and generators."""
    if isinstance(value, Tensor | torch.Generator):
        return copies[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_substitute(entry, copies) for entry in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, _substitute(entry, copies)) for name, entry in value.items())
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    with torch.no_grad():
        copy = value.detach().clone()
    if type(value) is nn.Parameter:  # torch.compile compiles anew for another type
        return nn.Parameter(copy, requires_grad=value.requires_grad)
    return copy.requires_grad_(value.requires_grad)
