"""Write scalars directly to the loggers, at the same steps as Lightning's own."""

from lightning.pytorch import Trainer


def is_logging_batch(trainer: Trainer) -> bool:
    """Whether to log in this training batch: one of every `trainer.log_every_n_steps`; 0 disables logging."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's logger connector sets it
    return interval > 0 and (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % interval == 0


def log_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    """Write `scalars` to every logger now. `LightningModule.log` would drop values between two logging steps."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
