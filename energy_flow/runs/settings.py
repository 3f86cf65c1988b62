"""Settings of a training run, and the choice of a device."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from energy_flow.comparison.baselines import BaselineSettings
from energy_flow.errors import ConfigError
from energy_flow.metrics.task import REGRESSION, RETRIEVAL, Task, direction, is_known, task_of
from energy_flow.settings import ProgramSettings, read
from energy_flow.training.losses import LossSettings

Section = dict[str, Any]


class ScoredSettings(ProgramSettings):
    """The keys that the configs of training and evaluation share."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    optimized_metric: str
    baselines: BaselineSettings

    @property
    def task(self) -> Task:
        """The task of `optimized_metric`; a ConfigError if the metric is unknown."""
        return task_of(self.optimized_metric)


class TrainSettings(ScoredSettings):
    """The whole config of a training run. The classes that own the sections check them."""

    optimized_mode: Literal["min", "max"] | None = None  # older runs have none
    ckpt_path: str | None
    resume: Literal["auto"] | None
    test: bool
    lattice: Section
    model: Section
    data: Section
    loss: Section
    optimizer: Section
    rollout: Section
    trainer: Section
    callbacks: Section | None = None
    logger: Section | None = None

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        if self.resume is not None and self.ckpt_path is not None:
            raise ValueError(f"resume = {self.resume} and ckpt_path = {self.ckpt_path}: give one of them")
        return self

    @property
    def task(self) -> Task:
        """The task of `optimized_metric`. With a metric of one's own the loss decides: ranks or errors.

        Raises:
            ConfigError: a metric has no direction, or another one than `optimized_mode` says.
        """
        name, mode = self.optimized_metric, self.optimized_mode
        if is_known(name):
            if mode not in (None, direction(name)):
                raise ConfigError(f"optimized_mode = {mode!r}: {name} is best at its {direction(name)}. Leave it null")
            return task_of(name)
        if mode is None:
            try:
                return task_of(name)
            except ConfigError as error:
                raise ConfigError(f"{error}; for another one set optimized_mode, min or max") from error
        if not name.startswith("val/"):
            raise ConfigError(f"optimized_metric = {name!r}: must be measured in a validation: val/NAME")
        loss = read(LossSettings, self.loss, "loss")
        return RETRIEVAL if loss.contrastive > 0 or loss.cosine > 0 else REGRESSION

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the checkpoints that the run can resume from."""
        last = (self.callbacks or {}).get("last_checkpoint") or {}
        return Path(last.get("dirpath", Path(self.paths.output_dir, "checkpoints")))


def find_device(name: str) -> torch.device:
    """The device for the config key `device`: cpu, cuda (a ConfigError without a GPU) or auto."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no GPU here. Set device=auto")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")
