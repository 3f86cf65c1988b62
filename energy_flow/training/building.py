"""Trainer, callbacks and loggers from their config sections; what can't work ends here, before any training."""

import inspect
import logging
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import hydra
import lightning.pytorch as pl
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, did_you_mean, explain, read

log = logging.getLogger(__name__)

Interval = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]


class TrainerSettings(Settings):
    """Config group `trainer`: arguments of Lightning's Trainer. Those named here are checked; all others go through."""

    model_config = ConfigDict(extra="allow")

    accelerator: str
    devices: Annotated[int, Field(ge=-1)] | list[int] | str
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]
    max_epochs: Annotated[int, Field(ge=1)] | Literal[-1] | None
    max_steps: Annotated[int, Field(ge=1)] | Literal[-1]
    gradient_clip_val: Annotated[float, Field(ge=0)] | None
    accumulate_grad_batches: Annotated[int, Field(ge=1)]
    check_val_every_n_epoch: Annotated[int, Field(ge=1)] | None
    val_check_interval: Interval | None
    log_every_n_steps: Annotated[int, Field(ge=1)]
    num_sanity_val_steps: Annotated[int, Field(ge=-1)]
    deterministic: bool | Literal["warn"]
    enable_progress_bar: bool
    enable_model_summary: bool

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.max_steps == -1 and self.max_epochs in (None, -1):
            raise ValueError(
                f"trainer.max_epochs = {'null' if self.max_epochs is None else -1} and trainer.max_steps = -1: the "
                "cosine decay needs to know where a run ends. Set one of them"
            )
        return self


_RESERVED = {"logger": "the group `logger`", "callbacks": "the group `callbacks`", "default_root_dir": "paths.log_dir"}


def build_trainer(
    section: Mapping[str, Any],
    *,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
    output_dir: str,
    num_batches: int | None = None,
) -> pl.Trainer:
    """Lightning's Trainer from the config group `trainer`.

    Args:
        section: the config section, a plain mapping.
        callbacks, loggers: as built.
        output_dir: the run's folder.
        num_batches: training batches per epoch; logs at least once per epoch, so that short runs have a curve too.

    Raises:
        ConfigError: an argument that the Trainer doesn't have or can't use, or a device that isn't there.
    """
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    _refuse_unknown(section, known - _RESERVED.keys(), "trainer")
    settings = read(TrainerSettings, section, "trainer")
    arguments = {**dict(section), "log_every_n_steps": min(settings.log_every_n_steps, num_batches or 10**9)}
    if not settings.enable_progress_bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, pl.callbacks.ProgressBar)]
    try:
        return pl.Trainer(**arguments, callbacks=callbacks, logger=loggers, default_root_dir=output_dir)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"trainer (accelerator={settings.accelerator}, devices={settings.devices}, "
            f"precision={settings.precision}): {_first_line(error)}"
        ) from error


def build_all(section: Mapping[str, Any] | None, key: str) -> list[Any]:
    """Build every entry of a group whose entries name their class in `_target_`; null entries are left out.

    Raises:
        ConfigError: a class that isn't there, or an argument that it doesn't have or can't use.
    """
    built = []
    for name, entry in (section or {}).items():
        if entry is None:
            continue
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise ConfigError(f"{key}.{name} = {entry!r}: must be a section with a _target_, or null to leave it out")
        built.append(_build(entry, f"{key}.{name}"))
    return built


def _build(entry: Mapping[str, Any], key: str) -> Any:
    target = _target(entry["_target_"], key)
    parameters = inspect.signature(target).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        _refuse_unknown(entry, set(parameters) | {"_target_"}, key)
    try:
        return hydra.utils.instantiate(entry, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{key}: {_first_line(error.__cause__ or error)}") from error


def _target(path: str, key: str) -> Callable[..., Any]:
    try:
        return hydra.utils.get_class(path)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{key}._target_ = {path}: {_first_line(error)}") from error


def _refuse_unknown(section: Mapping[str, Any], known: set[str], key: str) -> None:
    for name in section:
        if name in _RESERVED and key == "trainer":
            raise ConfigError(f"trainer.{name}: set it through {_RESERVED[name]}")
        if name not in known:
            raise ConfigError(f"{key}.{name}: unknown key; {did_you_mean(name, known - {'_target_'})}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
