"""Every private name of Lightning that the package uses, one small function each.

Private names can change with any release of Lightning: tests/checkpoints/test_lightning_loops.py tests each assumption
made here, and that no other module uses a private name, apart from the methods that a subclass must override.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn

# Keys of `trainer.fit_loop.state_dict()`, which is the section `loops.fit_loop` of a checkpoint.
TRAINING_BATCHES = "epoch_loop.batch_progress"
VALIDATION_BATCHES = "epoch_loop.val_loop.batch_progress"


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """The environment that started the processes, such as SLURM."""
    return trainer._accelerator_connector.cluster_environment


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint of this moment, after all hooks; it isn't written, and waits for no other process."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def is_fitting(module: LightningModule) -> bool:
    """Whether a module has a trainer, and the trainer fits it."""
    return module._trainer is not None and module._trainer.state.fn == TrainerFn.FITTING


def get_logging_step(trainer: Trainer) -> int:
    """The step under which Lightning logs a running training batch; `global_step` has moved on at the batch's end."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logging_step(trainer: Trainer, step: int) -> None:
    """Set the step under which Lightning logs the next training batch."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def has_stepped(trainer: Trainer) -> bool:
    """Whether the optimiser stepped in the running training batch, so that no gradients are accumulated."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the running training batch is the last one of its epoch or of the run."""
    return trainer.fit_loop.epoch_loop._is_training_done


def validates_next(trainer: Trainer) -> bool:
    """Whether a validation follows the running training batch."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def last_saved_path(callback: ModelCheckpoint) -> str:
    """The path of the checkpoint that a callback saved last, also where it could not be written; "": none."""
    return callback._last_checkpoint_saved


def kill_spawned_processes(trainer: Trainer) -> Callable[[int], None] | None:
    """A function that sends a signal to the processes that train; None: this process trains itself."""
    launcher = trainer.strategy.launcher
    return launcher.kill if isinstance(launcher, _MultiProcessingLauncher) else None


def carries_weights_back(path: str | Path) -> bool:
    """Whether Lightning made a file to carry the `state_dict` of a spawned process back to the first one."""
    return Path(path).name == ".temp.ckpt"


def launches_script(trainer: Trainer) -> bool:
    """Whether each further process runs the whole script again, as the strategy `ddp` does."""
    return isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
