"""The parts of a training run around Lightning's own: introduce it, fit, log its results."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch.multiprocessing.spawn import ProcessExitedException

from energy_flow import signals
from energy_flow.checkpoints.io import LoadedCheckpoint
from energy_flow.checkpoints.lightning_loops import kill_spawned_processes
from energy_flow.core.faults import REMEDY
from energy_flow.data import RunData
from energy_flow.errors import ConfigError, EnergyFlowError, NotFiniteError
from energy_flow.runs.resume import how_to_resume
from energy_flow.runs.screen import describe
from energy_flow.runs.settings import TrainSettings
from energy_flow.settings import flatten
from energy_flow.training.module import EnergyFlowModule


def introduce(
    console: Console, settings: TrainSettings, module: EnergyFlowModule, data: RunData, trainer: Trainer
) -> None:
    """Print the folder, model, data and device of a run."""
    console.print(
        f"run folder: {settings.paths.output_dir}\n"
        f"{describe(module)}\n"
        f"data {settings.data.get('name', settings.data.get('_target_'))}: {data.describe()}\n"
        f"device {trainer.strategy.root_device}, precision {trainer.precision}, seed {settings.seed}",
        highlight=False,
        soft_wrap=True,
    )


def fit(
    trainer: Trainer,
    module: EnergyFlowModule,
    data: RunData,
    resumed: LoadedCheckpoint | None,
    last: Path,
) -> None:
    """Train a module, from a checkpoint or anew; a note in an error says how to resume from the `last` checkpoint.

    Raises:
        KeyboardInterrupt: after a signal.
        ConfigError: the trainer can't work with its settings.
        NotFiniteError: anomaly mode found the operation that made a NaN.
    """
    if resumed is not None and kill_spawned_processes(trainer):
        resumed.contents = None  # every spawned process reads the file itself
    ckpt_path = None if resumed is None else str(resumed.path)
    try:
        with ended_by_signals(trainer):
            trainer.fit(module, datamodule=data.loaders, ckpt_path=ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    except EnergyFlowError:  # its message has the remedy
        raise
    except Exception as error:
        if "returned nan values in its" in str(error):
            raise NotFiniteError(f"{error} The traceback above shows the call. {REMEDY}") from error
        error.add_note(how_to_resume(last, resumed))
        raise


@contextmanager
def ended_by_signals(trainer: Trainer) -> Iterator[None]:
    """Let a trainer work inside; however a signal ends it, it is one KeyboardInterrupt outside."""
    kill = kill_spawned_processes(trainer)
    try:
        with nullcontext() if kill is None else signals.forwarded(kill):
            yield
    except SystemExit:  # raised by Lightning and by callbacks
        raise KeyboardInterrupt from None
    except (ProcessExitedException, RuntimeError) as error:
        # A signal to all processes of a job ends its data workers at once.
        ended = isinstance(error, ProcessExitedException) or str(error).startswith("DataLoader worker (pid")
        if not ended or signals.received() is None:
            raise
        raise KeyboardInterrupt from None


def log_results(trainer: Trainer, settings: TrainSettings, metrics: Mapping[str, float]) -> None:
    """Write TensorBoard's page of hyperparameters: settings that influence the weights, and the most important metrics.

    The metrics are renamed to `result/...`: the curves of the same metrics must not get a point at step 0.
    """
    sections = {name: getattr(settings, name) for name in ("lattice", "model", "loss", "optimizer")}
    data = {name: settings.data[name] for name in ("name", "_target_", "batch_size") if name in settings.data}
    fitting = {name: settings.trainer[name] for name in ("max_epochs", "precision")}
    flat = flatten({"seed": settings.seed, **sections, "data": data, "trainer": fitting})
    hparams = {key: value if isinstance(value, int | float | str) else str(value) for key, value in flat.items()}
    task = settings.task
    names = [*(f"test/{metric}" for metric in task.headings), *task.optimized, settings.optimized_metric]
    names += ["params", "fit_seconds"]
    results = {f"result/{name}": metrics[name] for name in names if name in metrics}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hparams, results, trainer.global_step)
            logger.finalize("success")  # again: the line above opened a writer, which is a thread
