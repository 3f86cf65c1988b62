"""Ctrl-C, SIGTERM and errors don't lose the run."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from energy_flow import signals
from energy_flow.checkpoints.position import LoopPosition, versions
from energy_flow.errors import ConfigError


class SaveOnInterrupt(Checkpoint):
    """Ends training between two steps when a signal has come, and leaves a checkpoint, also after an error.

    Between batches nothing is half done. Raised anywhere, a KeyboardInterrupt can also get lost: C code that asks an
    object for an attribute and takes any error for "it has none" swallows it, and the run goes on.

    The checkpoint is of the end of the last whole step; a validation that was broken off is begun anew when the run
    goes on. An error in the middle of a step leaves one, too, as long as the optimiser hasn't begun to write.

    Several processes agree before each batch whether to end, so all of them end, and save, at the same one. Where
    Lightning handles the signals of SLURM its handlers run, between two steps as well.

    Append it to `trainer.callbacks`: it must be the last one, so that the others have seen what it keeps.

    Args:
        path: the checkpoint; replaces what is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._boundary: LoopPosition | None = None
        self._versions: list[int] = []  # at the end of the last step
        self._mid_step = False  # gradients have been accumulated since
        self._saving = False
        self._requeue: Callable[[], Any] | None = None
        self._requeue_due = False
        self._child_ended: Any = None  # who wants to know while the optimiser writes
        self._child_has_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._versions = versions(trainer)
        self._take_signals(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._mid_step:
            self._end_if_received(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        # PyTorch raises the end of a data worker wherever it arrives: not among half of the weights.
        handler = _callable_handler(signal.SIGCHLD)
        if handler is not None and self._child_ended is None:
            self._child_ended = handler
            signal.signal(signal.SIGCHLD, self._note_child)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = versions(trainer)
        self._mid_step = now == self._versions
        if not self._mid_step:
            self._versions, self._boundary = now, LoopPosition.here(trainer)
        self._let_children_raise()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if _fitting(trainer) and not self._mid_step:
            self._boundary = LoopPosition.before_validation(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if _fitting(trainer):
            self._end_if_received(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if _fitting(trainer) and not self._mid_step:
            self._boundary = LoopPosition.here(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._boundary = LoopPosition.here(trainer)
        self._end_if_received(trainer)  # no other batch may follow

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        signals.let_through()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        signals.install()  # Lightning has put its own in the place of ours

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._child_ended = self._child_ended or _callable_handler(signal.SIGCHLD)
        if self._child_ended is not None:
            signal.signal(signal.SIGCHLD, self._note_child)  # the end of a worker must not break into the saving either
        if not isinstance(exception, ConfigError) and not self._saving and _fitting(trainer):
            try:
                self._save(trainer)
            except (OSError, RuntimeError) as error:
                exception.add_note(f"{self.path} could not be written: {' '.join(str(error).split())}")
        self._child_has_ended = False
        self._let_children_raise()
        signals.let_through()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._saving and self._boundary is not None:
            self._boundary.write_into(checkpoint)

    def _take_signals(self, trainer: Trainer) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        signals.note()
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            signals.install()  # Lightning has put its own in the place of ours
            return
        signum = environment.requeue_signal or signal.SIGUSR1
        handler = signal.getsignal(signum)
        if callable(handler):
            self._requeue = lambda: handler(signum, None)
            signal.signal(signum, self._note_requeue)

    def _note_child(self, signum: int, frame: Any) -> None:
        self._child_has_ended = True

    def _let_children_raise(self) -> None:
        handler, self._child_ended = self._child_ended, None
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
            if self._child_has_ended:
                handler(signal.SIGCHLD, None)

    def _note_requeue(self, signum: int, frame: Any) -> None:
        self._requeue_due = True

    def _end_if_received(self, trainer: Trainer) -> None:
        requeue, anywhere = self._requeue, trainer.strategy.reduce_boolean_decision
        if requeue is not None and anywhere(self._requeue_due, all=False):
            self._requeue_due, self._saving = False, True
            requeue()
            self._saving = False
        if anywhere(signals.received() is not None, all=False):
            self._saving = True
            if self._boundary is not None:
                trainer.save_checkpoint(self.path, weights_only=False)
            raise SystemExit(signals.exit_code())

    def _save(self, trainer: Trainer) -> None:
        """Save the boundary if the weights are still those; in this process alone, others may not be able to."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.processed > progress.current.completed and not progress.is_last_batch:
            self._boundary = LoopPosition.here(trainer)  # a callback failed at the end of a batch
        if self._boundary is None or not self._boundary.holds(trainer):
            return
        self._saving = True
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.save_checkpoint(checkpoint, self.path)


def _callable_handler(signum: signal.Signals) -> Any:
    handler = signal.getsignal(signum)
    return handler if callable(handler) else None


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
