"""Build callbacks and loggers from config sections that name their class in `_target_`."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from energy_flow import targets
from energy_flow.errors import ConfigError
from energy_flow.training.csv_logger import ResumableCSVLogger

# Attribute of built callbacks and loggers: their key in the config, for messages.
CONFIG_KEY = "config_key"

# Loggers that can append to their own files.
_PURGING = {f"{cls.__module__}.{cls.__qualname__}" for cls in (ResumableCSVLogger, TensorBoardLogger)} | {
    "lightning.pytorch.loggers.TensorBoardLogger"
}


def build_callbacks(section: Mapping[str, Any] | None) -> list[pl.Callback]:
    """Build the callbacks of the config group `callbacks`; null entries are left out.

    Raises:
        ConfigError: there is no such class, it isn't trusted (see `energy_flow.targets`), it is no callback, or it
            doesn't have or can't use an argument.
    """
    callbacks = _build_all(section, "callbacks", pl.Callback)
    for callback in callbacks:
        if isinstance(callback, pl.callbacks.EarlyStopping) and callback.patience < 1:  # Lightning doesn't check it
            raise ConfigError(
                f"{getattr(callback, CONFIG_KEY)}.patience = {callback.patience}: must be at least 1, or the first "
                "validation ends the run"
            )
    return callbacks


def build_loggers(section: Mapping[str, Any] | None, purge_step: int | None) -> list[Logger]:
    """Build the loggers of the config group `logger`, as `build_callbacks` does.

    Args:
        section: the group.
        purge_step: the step that the run resumes from; points of this step and later are logged again.
    """
    entries = dict(section or {})
    for name, entry in entries.items():
        if purge_step is not None and isinstance(entry, Mapping) and entry.get("_target_") in _PURGING:
            entries[name] = {**entry, "purge_step": purge_step}
    return _build_all(entries, "logger", Logger)


def _build_all(section: Mapping[str, Any] | None, key: str, kind: type) -> list[Any]:
    built = []
    for name, entry in (section or {}).items():
        if entry is None:
            continue
        where = f"{key}.{name}"
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise ConfigError(f"{where} = {entry!r}: must be a section with a _target_, or null to leave it out")
        found = targets.build(entry, where)
        if not isinstance(found, kind):
            named = f"{where}._target_ = {entry['_target_']}"
            raise ConfigError(f"{named}: gives a {type(found).__name__}, no {kind.__name__}")
        setattr(found, CONFIG_KEY, where)
        built.append(found)
    return built
