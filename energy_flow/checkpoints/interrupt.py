"""Keep a run that ends by Ctrl-C, SIGTERM or an error: save a checkpoint to resume from."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from energy_flow import signals
from energy_flow.checkpoints.lightning_loops import cluster_environment, dump_checkpoint
from energy_flow.checkpoints.position import LoopPosition, versions
from energy_flow.errors import ConfigError


class SaveOnInterrupt(Checkpoint):
    """End training between two steps after a signal, and leave a checkpoint, also after an error.

    Why not raise KeyboardInterrupt where the signal arrives? It could stop a step that is half done. It could also get
    lost: C code that asks an object for an attribute swallows it, as if the attribute were missing.

    The checkpoint is the end of the last complete step; a resumed run begins an interrupted validation anew. After an
    error in the middle of a step it is saved too, unless the optimiser has begun to write.

    Several processes decide together before each batch, so all of them end, and save, at the same one. Where Lightning
    handles the signals of SLURM, its handlers run, also between two steps.

    Append it to `trainer.callbacks`: it must be the last one, so that it saves the final state of the others.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._position: LoopPosition | None = None
        self._versions: list[int] = []  # at the end of the last step
        self._mid_step = False  # gradients were accumulated after it
        self._saving = False
        self._requeue: Callable[[], Any] | None = None
        self._requeue_due = False
        self._child_handler: Any = None  # of SIGCHLD, replaced while the optimiser writes
        self._child_has_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._versions = versions(trainer)
        self._handle_signals(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._mid_step:
            self._end_if_received(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        # PyTorch raises an error wherever the end of a data worker arrives: not when half of the weights are written.
        self._hold_child_handler()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = versions(trainer)
        self._mid_step = now == self._versions
        if not self._mid_step:
            self._versions, self._position = now, LoopPosition.here(trainer)
        self._restore_child_handler()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if _is_fitting(trainer) and not self._mid_step:
            self._position = LoopPosition.before_validation(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if _is_fitting(trainer):
            self._end_if_received(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if _is_fitting(trainer) and not self._mid_step:
            self._position = LoopPosition.here(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._position = LoopPosition.here(trainer)
        self._end_if_received(trainer)  # there may be no next batch

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        signals.raise_at_once()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        signals.install()  # Lightning has replaced our handlers

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._hold_child_handler()  # the end of a worker must not interrupt the saving either
        if not isinstance(exception, ConfigError) and not self._saving and _is_fitting(trainer):
            try:
                self._save(trainer)
            except (OSError, RuntimeError) as error:
                exception.add_note(f"{self.path} could not be written: {' '.join(str(error).split())}")
        self._child_has_ended = False
        self._restore_child_handler()
        signals.raise_at_once()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._saving and self._position is not None:
            self._position.write_into(checkpoint)

    def _handle_signals(self, trainer: Trainer) -> None:
        environment = cluster_environment(trainer)
        signals.defer()
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            signals.install()  # Lightning has replaced our handlers
            return
        signum = environment.requeue_signal or signal.SIGUSR1
        handler = signal.getsignal(signum)
        if callable(handler):
            self._requeue = lambda: handler(signum, None)
            signal.signal(signum, self._note_requeue)

    def _hold_child_handler(self) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        if self._child_handler is None and callable(handler):
            self._child_handler = handler
            signal.signal(signal.SIGCHLD, self._note_child)

    def _note_child(self, signum: int, frame: Any) -> None:
        self._child_has_ended = True

    def _restore_child_handler(self) -> None:
        handler, self._child_handler = self._child_handler, None
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
            if self._position is not None:
                trainer.save_checkpoint(self.path, weights_only=False)
            raise SystemExit(signals.exit_code())

    def _save(self, trainer: Trainer) -> None:
        """Save the position if the weights are still the same; in this process alone, others may not respond."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.processed > progress.current.completed and not progress.is_last_batch:
            self._position = LoopPosition.here(trainer)  # a callback failed at the end of a batch
        if self._position is None or not self._position.is_current(trainer):
            return
        self._saving = True
        trainer.strategy.save_checkpoint(dump_checkpoint(trainer), self.path)


def _is_fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
