"""Build an object from a config section that names its class in `_target_`.

A section may come from the user, who wrote it, or from a file of a stranger: a checkpoint, a run folder, a model's
card. A user's section may name any class. A section from a file may name classes of known packages only; the user adds
packages in the environment variable ENERGY_FLOW_TRUST.
"""

import contextvars
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from energy_flow.errors import ConfigError, EnergyFlowError
from energy_flow.settings import check_arguments, did_you_mean

# Environment variable with packages whose classes a section from a file may name, separated by commas.
TRUST = "ENERGY_FLOW_TRUST"
# Packages whose classes a file may name: parts of a lattice, layers, optimisers and times. None of them opens a file or
# a connection. Loggers and callbacks do: no file names them.
_KNOWN = ("energy_flow.core", "energy_flow.training.optimizer", "torch.nn", "torch.optim", "datetime")
_SHOWN = 100  # characters of a path in a message

_from_user: contextvars.ContextVar[bool] = contextvars.ContextVar("from_user", default=False)


@contextmanager
def from_user() -> Iterator[None]:
    """Inside, sections are the user's own: they may name any class, or function that gives an object."""
    with _set(True):
        yield


def is_from_user() -> bool:
    """Whether sections are the user's own."""
    return _from_user.get()


@contextmanager
def from_file() -> Iterator[None]:
    """Inside, sections come from a file, also within `from_user`. It is the default."""
    with _set(False):
        yield


@contextmanager
def _set(value: bool) -> Iterator[None]:
    token = _from_user.set(value)
    try:
        yield
    finally:
        _from_user.reset(token)


def build(entry: Any, key: str, given: Mapping[str, Any] | None = None, spare: Sequence[str] = ()) -> Any:
    """Build the object of a section.

    Args:
        entry: a mapping with `_target_` and arguments; an argument may be such a section, too.
        key: of the section in the config.
        given: further arguments, such as sizes. Each is passed if the class has it, and the section doesn't set it.
        spare: arguments of the section that are left out if the class doesn't have them.

    Raises:
        ConfigError: there is no such class, it isn't trusted, or an argument is unknown, missing or wrong.
    """
    if not isinstance(entry, Mapping) or "_target_" not in entry:
        raise ConfigError(f"{key} = {entry!r}: must be a section with a _target_, the path of a class")
    target = _find(entry, key)
    parameters = _parameters(target)
    takes_all = parameters is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    parameters = parameters or {}
    left_out = {"_target_", *(name for name in spare if name not in parameters and not takes_all)}
    arguments = {name: value for name, value in entry.items() if name not in left_out}
    unknown = [name for name in arguments if name not in parameters and not takes_all]
    if unknown:
        raise ConfigError(f"{key}.{unknown[0]}: unknown key; {did_you_mean(unknown[0], set(parameters))}")
    sizes = {name: value for name, value in (given or {}).items() if name in parameters and name not in arguments}
    missing = [name for name, p in parameters.items() if _is_required(p) and name not in {**arguments, **sizes}]
    if missing:
        raise ConfigError(f"{key}.{missing[0]}: {entry['_target_']} needs this argument. Set it")
    plain = {name: value for name, value in arguments.items() if not _holds_section(value)}
    check_arguments(_constructor(target), plain, key)
    try:
        built = {name: _instantiate(value, f"{key}.{name}") for name, value in arguments.items()}
        with from_file():  # the class itself may load a file, and a section in there isn't the user's
            return target(**built, **sizes)
    except (EnergyFlowError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any class: it isn't ours
        raise ConfigError(f"{key}: {type(error).__name__}: {one_line(error)}") from error


def parameters_of(entry: Mapping[str, Any], key: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the class that a section names.

    Raises:
        ConfigError: there is no such class, or it isn't trusted.
    """
    return _parameters(_find(entry, key)) or {}


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type."""
    return " ".join(str(error).split()) or type(error).__name__


def _constructor(target: Any) -> Callable[..., Any]:
    return target.__init__ if isinstance(target, type) else target  # type: ignore[misc]


def _parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a class; None for a class written in C that doesn't tell them."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return None


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not variadic


def _holds_section(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_section, value))
    return isinstance(value, Mapping)


def _instantiate(value: Any, key: str) -> Any:
    """An argument, at any depth, with its sections of classes built."""
    if isinstance(value, Mapping):
        if any(isinstance(name, str) and name.startswith("_") for name in value):
            return build(value, key)
        return {name: _instantiate(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_instantiate(part, f"{key}[{index}]") for index, part in enumerate(value)]
    return value


def _find(entry: Mapping[str, Any], key: str) -> Any:
    """The class that a section names; modules of other packages than the trusted ones aren't even imported."""
    path = entry.get("_target_")
    for name in entry:
        if isinstance(name, str) and name.startswith("_") and name != "_target_":
            raise ConfigError(f"{key}.{name}: unknown key; of Hydra's own keys only _target_ may be set")
    where = f"{key}._target_ = {str(path)[:_SHOWN]}"
    packages = (*_KNOWN, *filter(None, os.environ.get(TRUST, "").split(",")))
    refusal = (
        f"{where}: refused, none of its code was run: it comes from a file, and a file may name classes of "
        f"{', '.join(packages)} only. To trust another package, name it in the environment: {TRUST}=my_package. In "
        "Python, build your own config inside energy_flow.targets.from_user()"
    )
    if not isinstance(path, str) or not (_from_user.get() or _within(path, packages)):
        raise ConfigError(refusal)
    try:
        module, name = path.rsplit(".", 1)
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: there is no such class: {one_line(error)}") from error
    if not callable(found):
        raise ConfigError(f"{where}: is not a class")
    home = getattr(found, "__module__", None) or ""  # the path may reach a class that its module only imports
    if not (_from_user.get() or (isinstance(found, type) and _within(home, packages))):
        raise ConfigError(refusal)
    return found


def _within(path: str, packages: tuple[str, ...]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)
