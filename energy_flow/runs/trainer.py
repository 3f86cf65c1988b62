"""Build Lightning's Trainer from the config, and check that the run it describes can work."""

import inspect
import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pydantic import ConfigDict, Field, model_validator

from energy_flow.checkpoints.io import AtomicCheckpointIO
from energy_flow.errors import ConfigError
from energy_flow.runs.instantiate import CONFIG_KEY
from energy_flow.settings import Settings, check_arguments, did_you_mean, read
from energy_flow.targets import one_line
from energy_flow.training.callbacks.last_checkpoint import LastCheckpoint

log = logging.getLogger(__name__)

# Arguments of Lightning's Trainer that have another place in the config.
_RESERVED = {"logger": "the group `logger`", "callbacks": "the group `callbacks`", "default_root_dir": "paths.log_dir"}

Interval = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]


class TrainerSettings(Settings):
    """Config group `trainer`: arguments of Lightning's Trainer. The ones named here are checked, others passed on."""

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


def build_trainer(
    section: Mapping[str, Any],
    *,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
    output_dir: str,
    checkpoint_io: AtomicCheckpointIO | None = None,
) -> pl.Trainer:
    """Lightning's Trainer from the config group `trainer`.

    Raises:
        ConfigError: an argument that the Trainer doesn't have or can't use, a missing device, or a folder that can't be
            written.
    """
    _refuse_unknown(section)
    settings = read(TrainerSettings, section, "trainer")
    check_arguments(pl.Trainer.__init__, section, "trainer")
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
            plugins=[*(section.get("plugins") or []), checkpoint_io or AtomicCheckpointIO()],
            default_root_dir=output_dir,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        best = ". trainer.accelerator=auto takes the best device there is"
        remedy = "" if settings.accelerator in ("auto", "cpu") else best
        raise ConfigError(f"{where}: {one_line(error).rstrip('.!')}{remedy}") from error
    if trainer.precision != settings.precision:
        raise ConfigError(f"{where}: this device doesn't support it; trainer.precision={trainer.precision} works")
    _check_folders(trainer)
    return trainer


def _refuse_unknown(section: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a key that is no argument of Lightning's Trainer, or has another place in the config."""
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self", *_RESERVED}
    for name in section:
        if name in _RESERVED:
            raise ConfigError(f"trainer.{name}: set it through {_RESERVED[name]}")
        if name not in known:
            raise ConfigError(f"trainer.{name}: unknown key; {did_you_mean(name, known)}")


def _profiler(name: Any, output_dir: str) -> Any:
    """Build a profiler that writes its report into the run's folder: `fit-profile.txt`, `test-profile.txt`."""
    profilers = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return profilers[name](dirpath=output_dir, filename="profile") if name in profilers else name


def check_epoch(trainer: pl.Trainer, num_batches: int | None) -> None:
    """Refuse settings that would end a run in its first epoch, and adapt the intervals of a short run.

    A run logs at least once per epoch, so that a short one has a curve, and validates at its end at the latest.

    Args:
        trainer: its intervals are changed in place.
        num_batches: training batches of an epoch, of all processes together. None: nobody knows, nothing is checked.
    """
    if num_batches is None:
        return
    num_batches //= trainer.world_size
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
        log.info("first validation after %d batches, but training ends after %d: validating at its end", first, stop)
        # With `check_val_every_n_epoch=None` the interval may be longer than an epoch.
        trainer.val_check_interval, trainer.check_val_every_n_epoch = stop, None


def _stop(trainer: pl.Trainer, num_batches: int) -> int:
    """Batches after which training ends, at the latest."""
    stops = [trainer.max_epochs * num_batches] if trainer.max_epochs not in (None, -1) else []
    if trainer.max_steps != -1:
        accumulated = trainer.accumulate_grad_batches
        epochs, steps = divmod(trainer.max_steps, math.ceil(num_batches / accumulated))  # an epoch ends with a step
        stops.append(epochs * num_batches + min(num_batches, steps * accumulated))
    return min(stops)


def _check_folders(trainer: pl.Trainer) -> None:
    """Check that every folder that a run will write to can be written."""
    folders: list[tuple[str, str | Path | None]] = [("paths.output_dir", trainer.default_root_dir)]
    folders += [(f"{getattr(logger, CONFIG_KEY, 'logger')}.save_dir", logger.save_dir) for logger in trainer.loggers]
    folders += [
        (f"{getattr(callback, CONFIG_KEY, 'callbacks')}.dirpath", callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, pl.callbacks.ModelCheckpoint | LastCheckpoint)
    ]
    for key, folder in folders:
        if folder is None or "://" in str(folder):  # the default folder, or not on this machine
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"{key} = {folder}: can't be written ({error.strerror}). Give another folder") from error
