"""Find what cannot work before a run starts."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from rich.console import Console

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.data import EnergyDataModule
from energy_flow.errors import ConfigError
from energy_flow.metrics.task import REGRESSION, task_of
from energy_flow.training.losses import LossSettings


def check_loss(optimized_metric: str, loss: LossSettings) -> None:
    """See that what a run is measured by is trained.

    Raises:
        ConfigError: errors count, and the loss doesn't know them: InfoNCE leaves even the length of an embedding open.
    """
    if task_of(optimized_metric) is REGRESSION and loss.mse == 0:
        raise ConfigError(
            f"optimized_metric = {optimized_metric}, with loss.mse = 0: errors count, and aren't trained. Set loss=mse"
        )


def refuse_processes(trainer: Trainer, lattice: LatticeSettings, multirun: bool) -> None:
    """Find what several processes can't do, before they start.

    Raises:
        ConfigError: a multirun whose jobs launch the script several times (each would start the whole sweep again), or
            a lattice without steps, whose carrier gets no gradient.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and lattice.num_steps == 0:
        raise ConfigError(
            "lattice.max_steps = 0 (or lattice.depth = 1): neuron and carrier get no gradient, and several processes "
            "would wait for it. Set trainer.devices=1"
        )
    if multirun and isinstance(strategy.launcher, _SubprocessScriptLauncher):
        raise ConfigError(
            "trainer.devices: a multirun can't start several processes per job, every one of them would run the "
            "whole sweep. Set trainer.devices=1, or trainer.strategy=ddp_spawn"
        )


def check_normalisation(trained: bool, data: EnergyDataModule, model: str = "the model") -> None:
    """See that rows are prepared as those that a model was trained with.

    Args:
        model: what the message calls it.

    Raises:
        ConfigError: they aren't.
    """
    if trained != data.settings.normalize:
        value = str(trained).lower()
        raise ConfigError(
            f"data.normalize = {str(data.settings.normalize).lower()}: {model} was trained with {value}. "
            f"Set data.normalize={value}"
        )


def say_whose_data(
    trained_on: dict[str, str], data: EnergyDataModule, console: Console, model: str = "the checkpoint"
) -> None:
    """Say where data differ from those of the run that wrote a checkpoint; `model` is what it is called."""
    differing = [split for split, digest in data.fingerprint.items() if digest != trained_on.get(split)]
    if differing:
        said = f"other data than those that {model} was trained with: {', '.join(differing)}"
        console.print(said, markup=False, soft_wrap=True)
