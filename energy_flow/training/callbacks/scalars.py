"""Write scalars directly to the loggers, at the same steps as Lightning's own."""

from lightning.pytorch import Trainer

from energy_flow.checkpoints.lightning_loops import get_logging_step


def is_logging_batch(trainer: Trainer) -> bool:
    """Whether to log in this training batch: one of every `trainer.log_every_n_steps`; 0 disables logging."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's logger connector sets it
    return interval > 0 and (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % interval == 0


def logging_step(trainer: Trainer) -> int:
    """The step at which Lightning logs the values of this training batch.

    At the end of a batch `global_step` is already one higher. Lightning's own callbacks read this counter too.
    """
    return get_logging_step(trainer)


def log_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    """Write `scalars` to every logger now. `LightningModule.log` would drop values between two logging steps."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
