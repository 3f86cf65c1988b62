"""Log the time of the phases of a training batch."""

from collections import deque
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from energy_flow.checkpoints.lightning_loops import get_logging_step
from energy_flow.core.timing import PhaseTimer
from energy_flow.training.callbacks.scalars import is_logging_batch, log_scalars


class PhaseTimes(Callback):
    """Log `time/place`, `time/propagate`, `time/collect`, `time/aggregate` and `time/backward` in seconds.

    It times one batch of every `trainer.log_every_n_steps`. For that batch it sets `pl_module.phase_timer`, which the
    module passes to the processor; in all other batches the timer is None. The times of a CUDA device are read one
    batch later, so that training doesn't wait for the device. They are logged at their own step.
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
            self._pending.append((get_logging_step(trainer), self._timer))
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
