"""Build callbacks and loggers from config sections that name their class in `_target_`."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import hydra
import lightning.pytorch as pl
from hydra.errors import InstantiationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from energy_flow.errors import ConfigError
from energy_flow.settings import check_arguments, did_you_mean
from energy_flow.training.csv_logger import ResumableCSVLogger

# Attribute of built callbacks and loggers: their key in the config, for messages.
CONFIG_KEY = "config_key"

# Packages whose classes a config may build; more of them may be built as arguments.
_BUILT = ("energy_flow.training", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
_ARGUMENTS = (*_BUILT, "torch.optim", "datetime")

# Environment variable with more packages that the user trusts, separated by commas; a config can't set it.
TRUST = "ENERGY_FLOW_TRUST"

# Loggers that can append to their own files.
_PURGING = {f"{cls.__module__}.{cls.__qualname__}" for cls in (ResumableCSVLogger, TensorBoardLogger)} | {
    "lightning.pytorch.loggers.TensorBoardLogger"
}

RESERVED = {"logger": "the group `logger`", "callbacks": "the group `callbacks`", "default_root_dir": "paths.log_dir"}


def build_all(section: Mapping[str, Any] | None, key: str) -> list[Any]:
    """Build every entry of a group whose entries name their class in `_target_`; null entries are left out.

    A config may come from a stranger. So it can build callbacks and loggers of energy_flow, of Lightning, and of the
    packages in the environment variable ENERGY_FLOW_TRUST. Nothing else is imported.

    Raises:
        ConfigError: a class that doesn't exist or may not be built, or an argument that it doesn't have or can't use.
    """
    built = []
    for name, entry in (section or {}).items():
        if entry is None:
            continue
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise ConfigError(f"{key}.{name} = {entry!r}: must be a section with a _target_, or null to leave it out")
        built.append(_build(entry, f"{key}.{name}"))
        setattr(built[-1], CONFIG_KEY, f"{key}.{name}")
    return built


def build_loggers(section: Mapping[str, Any] | None, purge_step: int | None) -> list[Logger]:
    """Build the loggers of a run that resumes from `purge_step`: points of this step and later are logged again."""
    entries = dict(section or {})
    for name, entry in entries.items():
        if purge_step is not None and isinstance(entry, Mapping) and entry.get("_target_") in _PURGING:
            entries[name] = {**entry, "purge_step": purge_step}
    return build_all(entries, "logger")


def _build(entry: Mapping[str, Any], key: str) -> Any:
    target = _target(entry, key, _BUILT)
    for name, value in entry.items():
        _check_argument(value, f"{key}.{name}")
    parameters = inspect.signature(target).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        refuse_unknown(entry, set(parameters) | {"_target_"}, key)
    check_arguments(target.__init__, entry, key)  # type: ignore[misc]
    try:
        built = hydra.utils.instantiate(entry, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{key}: {one_line(error.__cause__ or error)}") from error
    if isinstance(built, pl.callbacks.EarlyStopping) and built.patience < 1:  # Lightning doesn't check it
        raise ConfigError(
            f"{key}.patience = {built.patience}: must be at least 1, or the first validation ends the run"
        )
    return built


def _check_argument(value: Any, key: str) -> None:
    """Check an argument at any depth: Hydra builds every mapping that names a class."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key} = {value!r}: would be resolved a second time; leave out the ${{")
    if isinstance(value, Mapping):
        if any(isinstance(name, str) and name.startswith("_") for name in value):
            _target(value, key, _ARGUMENTS)
        for name, part in value.items():
            _check_argument(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check_argument(part, f"{key}[{index}]")


def _target(entry: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> type:
    """The class that an entry names, if a config may build it; other modules aren't even imported."""
    path = entry.get("_target_")
    for name in entry:
        if isinstance(name, str) and name.startswith("_") and name != "_target_":
            raise ConfigError(f"{key}.{name}: unknown key; of Hydra's own keys only _target_ may be set")
    packages = (*allowed, *filter(None, os.environ.get(TRUST, "").split(",")))
    where = f"{key}._target_ = {path}"
    refusal = (
        f"{where}: refused, none of its code was run: a config builds classes of {', '.join(packages)} only. To trust "
        f"another package, name it in the environment: {TRUST}=my_package"
    )
    if not isinstance(path, str) or not _within(path, packages):
        raise ConfigError(refusal)
    try:
        found = hydra.utils.get_class(path)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error
    if not _within(found.__module__, packages):  # the path may reach a class that the module only imports
        raise ConfigError(refusal)
    return found


def _within(path: str, packages: tuple[str, ...]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def refuse_unknown(section: Mapping[str, Any], known: set[str], key: str) -> None:
    """Raise a ConfigError for a key that isn't known; it names the closest known one."""
    for name in section:
        if name in RESERVED and key == "trainer":
            raise ConfigError(f"trainer.{name}: set it through {RESERVED[name]}")
        if name not in known:
            raise ConfigError(f"{key}.{name}: unknown key; {did_you_mean(name, known - {'_target_'})}")


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type."""
    return " ".join(str(error).split()) or type(error).__name__
