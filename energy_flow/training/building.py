"""Trainer, callbacks and loggers from their config sections; what can't work ends here, before any training."""

import inspect
import logging
import math
import os
import tempfile
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import hydra
import lightning.pytorch as pl
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pydantic import ConfigDict, Field, model_validator

from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, check_type, did_you_mean, read
from energy_flow.training.callbacks.last_checkpoint import LastCheckpoint
from energy_flow.training.checkpoint_io import WholeCheckpoints
from energy_flow.training.csv_logger import ResumableCSVLogger

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


# What the module logs at the end of a validation.
VALIDATED = tuple(
    f"val/{name}"
    for name in (
        *("mrr", "recall@1", "recall@10", "recall@100", "median_rank", "cosine"),
        *("loss", "contrastive", "cosine_loss", "mse", "surface"),
    )
)

# Of callbacks and loggers that were built: where they stand in the config, for messages.
_KEY = "config_key"
# What Lightning takes and can't have been meant: without patience the first validation ends a run.
_LIMITS = {pl.callbacks.EarlyStopping: {"patience": Annotated[int, Field(ge=1)]}}

# What a config may build, and what else may stand in its arguments; by the package that a class is defined in.
_BUILT = ("energy_flow.training", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
_ARGUMENTS = (*_BUILT, "torch.optim", "datetime")
# Packages that a user trusts beside these, with commas between them; a config can't set it.
TRUST = "ENERGY_FLOW_TRUST"
# Loggers that can go on with their own files.
_PURGING = {f"{cls.__module__}.{cls.__qualname__}" for cls in (ResumableCSVLogger, TensorBoardLogger)} | {
    "lightning.pytorch.loggers.TensorBoardLogger"
}

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
        num_batches: training batches per epoch, for a trainer that trains.

    Raises:
        ConfigError: an argument that the Trainer doesn't have or can't use, a device that isn't there, a run that
            would end in its first epoch, or a folder that can't be written.
    """
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    _refuse_unknown(section, known - _RESERVED.keys(), "trainer")
    settings = read(TrainerSettings, section, "trainer")
    _check_types(pl.Trainer.__init__, section, "trainer")
    if not settings.enable_progress_bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, pl.callbacks.ProgressBar)]
    if not loggers:  # Lightning refuses it then
        callbacks = [callback for callback in callbacks if not isinstance(callback, pl.callbacks.LearningRateMonitor)]
    where = f"trainer (accelerator={settings.accelerator}, devices={settings.devices}, precision={settings.precision})"
    try:
        profiler = {"profiler": _profiler(section.get("profiler"), output_dir)}
        trainer = pl.Trainer(
            **{**section, **profiler},
            callbacks=callbacks,
            logger=loggers,
            plugins=[*(section.get("plugins") or []), WholeCheckpoints()],
            default_root_dir=output_dir,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        remedy = "" if settings.accelerator in ("auto", "cpu") else ". trainer.accelerator=auto takes what there is"
        raise ConfigError(f"{where}: {_one_line(error).rstrip('.!')}{remedy}") from error
    if trainer.precision != settings.precision:
        raise ConfigError(f"{where}: this device can't; trainer.precision={trainer.precision} works")
    if num_batches is not None:
        _check_epoch(trainer, num_batches // trainer.world_size)
    _check_folders(trainer)
    return trainer


def _profiler(name: Any, output_dir: str) -> Any:
    """Profilers write their report into the run's folder: `fit-profile.txt`, `test-profile.txt`."""
    profilers = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return profilers[name](dirpath=output_dir, filename="profile") if name in profilers else name


def _check_epoch(trainer: pl.Trainer, num_batches: int) -> None:
    """Find what would end a run in its first epoch; log at least once per epoch: short runs need a curve, too."""
    limit = trainer.limit_train_batches or 0
    num_batches = min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)
    if num_batches == 0:
        raise ConfigError(f"trainer.limit_train_batches = {limit}: leaves no batch to train on")
    trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, num_batches))  # type: ignore[attr-defined]
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if every is not None and isinstance(interval, int) and interval > num_batches:
        raise ConfigError(
            f"trainer.val_check_interval = {interval}: an epoch has {num_batches} batches. Lower it, or set "
            "trainer.check_val_every_n_epoch=null to count over epochs"
        )
    stop = _stop(trainer, num_batches)
    first = (every or 1) * (interval if isinstance(interval, int) else max(1, int(interval * num_batches)))
    if stop < first:
        log.info("the first validation would be after %d batches, training ends after %d: validating then", first, stop)
        # Counted over epochs, a number of batches may be larger than one of them.
        trainer.val_check_interval, trainer.check_val_every_n_epoch = stop, None
    _check_monitors(trainer)


def _stop(trainer: pl.Trainer, num_batches: int) -> int:
    """Batches after which training ends, at the latest."""
    stops = [trainer.max_epochs * num_batches] if trainer.max_epochs not in (None, -1) else []
    if trainer.max_steps != -1:
        accumulated = trainer.accumulate_grad_batches
        epochs, steps = divmod(trainer.max_steps, math.ceil(num_batches / accumulated))  # an epoch ends with a step
        stops.append(epochs * num_batches + min(num_batches, steps * accumulated))
    return min(stops)


def _check_monitors(trainer: pl.Trainer) -> None:
    """Every metric that a callback watches must be one that is measured."""
    watched = [
        (getattr(callback, _KEY, type(callback).__name__), callback.monitor)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if getattr(callback, "monitor", None) is not None
    ]
    for key, name in watched:
        if name not in VALIDATED and name != "train/loss" and not name.startswith("val/flows/"):
            raise ConfigError(f"{key}.monitor = {name!r}: no such metric; {did_you_mean(name, VALIDATED)}")
    waiting = {key: name for key, name in watched if name.startswith("val/")}
    if trainer.limit_val_batches == 0 and waiting:
        raise ConfigError(
            f"trainer.limit_val_batches = 0: {', '.join(sorted(set(waiting.values())))} would never be measured. "
            f"Validate, or leave out what watches it: {' '.join(f'{key}=null' for key in waiting)}"
        )


def _check_folders(trainer: pl.Trainer) -> None:
    """What a run writes later must find a folder that can be written."""
    folders: list[tuple[str, str | Path | None]] = [("paths.output_dir", trainer.default_root_dir)]
    folders += [(f"{getattr(logger, _KEY, 'logger')}.save_dir", logger.save_dir) for logger in trainer.loggers]
    folders += [
        (f"{getattr(callback, _KEY, 'callbacks')}.dirpath", callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, pl.callbacks.ModelCheckpoint | LastCheckpoint)
    ]
    for key, folder in folders:
        if folder is None or "://" in str(folder):  # in its default place, or not of this machine
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"{key} = {folder}: can't be written ({error.strerror}). Give another folder") from error


def build_all(section: Mapping[str, Any] | None, key: str) -> list[Any]:
    """Build every entry of a group whose entries name their class in `_target_`; null entries are left out.

    A config may come from anywhere: it builds callbacks and loggers of energy_flow and Lightning, and of the packages
    that the environment variable ENERGY_FLOW_TRUST names. Nothing else is imported.

    Raises:
        ConfigError: a class that isn't there or may not be built, or an argument that it doesn't have or can't use.
    """
    built = []
    for name, entry in (section or {}).items():
        if entry is None:
            continue
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise ConfigError(f"{key}.{name} = {entry!r}: must be a section with a _target_, or null to leave it out")
        built.append(_build(entry, f"{key}.{name}"))
        setattr(built[-1], _KEY, f"{key}.{name}")
    return built


def build_loggers(section: Mapping[str, Any] | None, purge_step: int | None) -> list[Logger]:
    """The loggers of the group `logger`.

    Args:
        purge_step: the step that a run goes on from: what its files hold of this step and later isn't shown twice.
            None: a new run.
    """
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
        _refuse_unknown(entry, set(parameters) | {"_target_"}, key)
    _check_types(target.__init__, entry, key)  # type: ignore[misc]
    for base, limits in _LIMITS.items():
        for name in limits.keys() & entry.keys() if issubclass(target, base) else ():
            check_type(entry[name], limits[name], f"{key}.{name}")
    try:
        return hydra.utils.instantiate(entry, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{key}: {_one_line(error.__cause__ or error)}") from error


def _check_argument(value: Any, key: str) -> None:
    """Hydra builds whatever names a class, at any depth."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key} = {value!r}: would be looked up once more; leave out the ${{")
    if isinstance(value, Mapping):
        if any(isinstance(name, str) and name.startswith("_") for name in value):
            _target(value, key, _ARGUMENTS)
        for name, part in value.items():
            _check_argument(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check_argument(part, f"{key}[{index}]")


def _target(entry: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> type:
    """The class that an entry names, if it may be built; others aren't even imported."""
    path = entry.get("_target_")
    for name in entry:
        if isinstance(name, str) and name.startswith("_") and name != "_target_":
            raise ConfigError(f"{key}.{name}: unknown key; of those that Hydra knows only _target_ may be set")
    packages = (*allowed, *filter(None, os.environ.get(TRUST, "").split(",")))
    where = f"{key}._target_ = {path}"
    refusal = (
        f"{where}: refused, nothing of it was run: a config builds classes of {', '.join(packages)} alone. To trust "
        f"another package, name it in the environment: {TRUST}=my_package"
    )
    if not isinstance(path, str) or not _within(path, packages):
        raise ConfigError(refusal)
    try:
        found = hydra.utils.get_class(path)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {_one_line(error)}") from error
    if not _within(found.__module__, packages):  # a module's own imports can be reached through its name
        raise ConfigError(refusal)
    return found


def _within(path: str, packages: tuple[str, ...]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _refuse_unknown(section: Mapping[str, Any], known: set[str], key: str) -> None:
    for name in section:
        if name in _RESERVED and key == "trainer":
            raise ConfigError(f"trainer.{name}: set it through {_RESERVED[name]}")
        if name not in known:
            raise ConfigError(f"{key}.{name}: unknown key; {did_you_mean(name, known - {'_target_'})}")


def _check_types(function: Callable[..., Any], section: Mapping[str, Any], key: str) -> None:
    """Types of the arguments of a class that doesn't check them itself; Lightning's callbacks take anything."""
    hints = typing.get_type_hints(function)
    for name, value in section.items():
        if name in hints and not isinstance(value, Mapping):
            check_type(value, hints[name], f"{key}.{name}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
