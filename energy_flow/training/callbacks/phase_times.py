"""Time of placing, propagating, collecting, aggregating and backward."""

from collections import deque
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from energy_flow.core.timing import PhaseTimer
from energy_flow.training.callbacks.scalars import is_logging_batch, log_scalars, logging_step


class PhaseTimes(Callback):
    """Logs `time/place`, `time/propagate`, `time/collect`, `time/aggregate` and `time/backward` in seconds.

    One batch of every `trainer.log_every_n_steps` is timed: its `pl_module.phase_timer` is a `PhaseTimer`, which the
    module hands to the processor; in all other batches it is None. Times of a CUDA device are read a batch later,
    so that nobody waits for the device, and logged at the step they belong to.
    """

    def __init__(self) -> None:
        self._timer: PhaseTimer | None = None
        self._pending: deque[tuple[int, PhaseTimer]] = deque()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._timer = PhaseTimer(pl_module.device) if is_logging_batch(trainer) else None
        pl_module.phase_timer = self._timer

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if self._timer is not None:
            self._timer.start("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self._timer is not None:
            self._timer.stop("backward")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._timer is not None:
            self._pending.append((logging_step(trainer), self._timer))
            self._timer = pl_module.phase_timer = None
        if self._pending:
            self._log_finished(trainer, wait=False)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._log_finished(trainer, wait=True)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._timer = pl_module.phase_timer = None
        self._pending.clear()

    def _log_finished(self, trainer: Trainer, *, wait: bool) -> None:
        while self._pending:
            step, timer = self._pending[0]
            seconds = timer.seconds(wait=wait)
            if seconds is None:
                return
            self._pending.popleft()
            log_scalars(trainer, {f"time/{phase}": value for phase, value in seconds.items()}, step)
