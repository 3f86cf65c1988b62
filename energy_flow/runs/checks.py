"""Refuse settings that cannot work, before a run starts."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from energy_flow.checkpoints.lightning_loops import launches_script
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.data import EnergyDataModule, OwnData, RunData
from energy_flow.errors import ConfigError
from energy_flow.metrics.task import REGRESSION
from energy_flow.training.losses import LossSettings


def check_loss(optimized_metric: str, loss: LossSettings) -> None:
    """Raise a ConfigError if an error is measured and the loss has no MSE: InfoNCE leaves the length open."""
    if optimized_metric in REGRESSION.optimized and loss.mse == 0 and not any(loss.term_weights().values()):
        raise ConfigError(
            f"optimized_metric = {optimized_metric}, with loss.mse = 0: the loss doesn't train the measured error. "
            "Set loss=mse"
        )


def check_candidates(loss: LossSettings, data: RunData) -> None:
    """Raise a ConfigError if the candidates are all training targets, and the data give no such list."""
    if isinstance(data, OwnData) and loss.contrastive > 0 and loss.candidates == "bank":
        raise ConfigError(
            "loss.candidates = bank: needs all training targets at once, and data._target_ gives batches. "
            "Set loss.candidates=batch"
        )


def refuse_processes(trainer: Trainer, lattice: LatticeSettings, multirun: bool) -> None:
    """Raise a ConfigError for runs that several processes can't do, before they start."""
    if isinstance(trainer.strategy, DDPStrategy) and lattice.num_steps == 0:
        raise ConfigError(
            "lattice.max_steps = 0 (or lattice.depth = 1): neuron and carrier get no gradient, and several processes "
            "would wait for it forever. Set trainer.devices=1"
        )
    if multirun and launches_script(trainer):
        raise ConfigError(
            "trainer.devices: a multirun can't start several processes per job, because each would run the whole "
            "sweep. Set trainer.devices=1, or trainer.strategy=ddp_spawn"
        )


def check_normalisation(trained: bool, data: EnergyDataModule, model: str = "the model") -> None:
    """Raise a ConfigError if the rows aren't normalised as in the training of a model (`data.normalize` there)."""
    if trained != data.settings.normalize:
        value = str(trained).lower()
        raise ConfigError(
            f"data.normalize = {str(data.settings.normalize).lower()}: {model} was trained with {value}. "
            f"Set data.normalize={value}"
        )


def say_whose_data(trained_on: dict[str, str], data: RunData, console: Console, model: str = "the checkpoint") -> None:
    """Print which splits differ from the data that a model was trained on (split -> digest)."""
    differing = [split for split, digest in data.fingerprint.items() if digest != trained_on.get(split)]
    if differing:
        message = f"not the data that {model} was trained with: {', '.join(differing)}"
        console.print(message, markup=False, soft_wrap=True)
