"""Scalars that callbacks write straight to the loggers, on the same time axis as Lightning's own."""

from lightning.pytorch import Trainer

from energy_flow.checkpoints.lightning_loops import get_logging_step


def is_logging_batch(trainer: Trainer) -> bool:
    """Whether the running training batch is one of every `trainer.log_every_n_steps`; 0 switches logging off."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's logger connector sets it
    return interval > 0 and (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % interval == 0


def logging_step(trainer: Trainer) -> int:
    """The step under which Lightning logs what the running training batch logs.

    `global_step` has already moved on at the end of a batch; Lightning's own callbacks read this counter too.
    """
    return get_logging_step(trainer)


def log_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    """Write `scalars` to every logger now. `LightningModule.log` would drop batches between two logging steps."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
