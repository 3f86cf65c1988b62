"""Strict settings: refuse unknown keys, wrong types and values out of range before any work starts.

Every class owns its `Settings`; the defaults are in `conf/` only.
"""

import difflib
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, SchemaError

from energy_flow.errors import ConfigError


class Settings(BaseModel):
    """Base of all settings: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class PathSettings(Settings):
    """Config group `paths`."""

    log_dir: str
    output_dir: str


class ProgramSettings(Settings):
    """The keys that the configs of all programs share."""

    task_name: str
    paths: PathSettings


SettingsT = TypeVar("SettingsT", bound=Settings)
P = ParamSpec("P")


def read(settings: type[SettingsT], section: Any, key: str) -> SettingsT:
    """Build settings from a config section, a plain mapping; its key, e.g. `lattice`, is "" for the whole config.

    Raises:
        ConfigError: names every wrong key with its value, the limit and the remedy.
    """
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key} = {section!r}: must be a section with the keys {', '.join(settings.model_fields)}")
    try:
        return settings.model_validate(dict(section))
    except ValidationError as error:
        found = [_explain(settings, detail, key) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(_join(found))) from error


@dataclass(frozen=True)
class Remedy:
    """The end of a message about an argument: `Annotated[int, Field(ge=1), Remedy("null removes the callback")]`."""

    text: str


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> None:
    """Check arguments against the annotations of a function, also of a third-party one; mappings pass unchecked.

    Raises:
        ConfigError: names every wrong argument with its key, its value, the limit and the `Remedy`.
    """
    hints = annotations(function)
    checked = {name: value for name, value in arguments.items() if name in hints and not isinstance(value, Mapping)}
    found = [line for name, value in checked.items() for line in _wrong_value(value, hints[name], f"{key}.{name}")]
    if found:
        raise ConfigError("\n".join(found))


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's arguments, without those that can't be resolved at run time.

    An annotation may name a class that is imported under `TYPE_CHECKING` alone.
    """
    function = inspect.unwrap(function)
    names = getattr(function, "__globals__", {})
    found: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with suppress(NameError, AttributeError, TypeError, SyntaxError):
            found |= typing.get_type_hints(alone, names, include_extras=True)
    return found


def checked_arguments(key: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a constructor: check its arguments, from the config section `key`, with `check_arguments`."""

    def decorate(constructor: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(constructor)

        @functools.wraps(constructor)
        def construct(*args: P.args, **kwargs: P.kwargs) -> None:
            check_arguments(constructor, signature.bind(*args, **kwargs).arguments, key)
            constructor(*args, **kwargs)

        return construct

    return decorate


def _wrong_value(value: Any, annotation: Any, key: str) -> list[str]:
    """Lines of a message if the value doesn't have the type, or none. pydantic can't check every third-party type."""
    try:
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except (PydanticUserError, SchemaError):
        return []
    except ValidationError as error:
        if _fits_as_json(value, annotation):
            return []
        lines = _join((f"{key} = {_shown(value)}", _reason(detail)) for detail in error.errors(include_url=False))
        remedies = [extra.text for extra in getattr(annotation, "__metadata__", ()) if isinstance(extra, Remedy)]
        return ["; ".join([line, *remedies]) for line in lines]
    return []


def _fits_as_json(value: Any, annotation: Any) -> bool:
    """Whether a value has the type in the way of JSON. A config has no tuples, sets, paths or enums of its own."""
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        return False
    return True


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys; an empty section counts as a value."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return flat


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the closest of the `known` names, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _explain(settings: type[BaseModel], detail: ErrorDetails, key: str) -> tuple[str, str]:
    """The key with its value, and the fault."""
    # pydantic puts the members of a union into the location as type names ("int"); they are no part of the key.
    path, owner = [key] if key else [], settings
    for part in detail["loc"]:
        if isinstance(part, int):
            path[-1] = f"{path[-1]}[{part}]"
            continue
        if part not in owner.model_fields and detail["type"] != "extra_forbidden":
            break
        path.append(part)
        annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
    full = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return full, f"unknown key; {did_you_mean(path[-1], owner.model_fields)}"
    if detail["type"] == "missing":
        return full, "missing; give it a value"
    if detail["type"] == "dict_type" and isinstance(detail["input"], str):
        choice = f"{full.replace('.', '/')}={detail['input']}"
        return f"{full} = {_shown(detail['input'])}", f"must be a section or null; to choose an option, give {choice}"
    if detail["type"] == "model_type":
        return f"{full} = {_shown(detail['input'])}", f"must be a section with the keys {', '.join(owner.model_fields)}"
    if detail["type"] == "value_error" and detail["loc"] == ():
        return "", _reason(detail)  # a rule over several keys; its message names them
    return f"{full} = {_shown(detail['input'])}", _reason(detail)


def _reason(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"] == "value_error":  # our own words, which may hold the user's value
        return message
    return re.sub(r"\d+\.\d{6,}", lambda limit: f"{float(limit[0]):.4g}", message)  # 2/3 with four digits


def _join(found: Iterable[tuple[str, str]]) -> list[str]:
    """One line per key, also where each member of a union has its own reason."""
    reasons: dict[str, list[str]] = {}
    for head, reason in found:
        reasons.setdefault(head, []).append(reason)
    return [": ".join(filter(None, (head, ", or ".join(dict.fromkeys(said))))) for head, said in reasons.items()]


def _shown(value: Any) -> str:
    """A value in the notation of a config."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)
