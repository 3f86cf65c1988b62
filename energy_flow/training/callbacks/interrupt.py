"""Ctrl-C doesn't lose the run."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class SaveOnInterrupt(Callback):
    """Ctrl-C ends training after the batch that is being worked on, with a checkpoint; a second one ends it at once.

    Between batches nothing is half done. Raised anywhere, a KeyboardInterrupt can also get lost: C code that asks an
    object for an attribute and takes any error for "it has none" swallows it, and the run goes on.

    Nothing is saved in a validation: Lightning can't go on from the middle of one. The checkpoint of the epoch before
    stays then.

    Args:
        path: the checkpoint; replaces what is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pressed = False
        self._handler_before: Any = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._note)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._give_back()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._end_if_pressed()

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._end_if_pressed()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._end_if_pressed()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt):
            self._give_back()
        elif trainer.training:  # Lightning ignores further ones now, until the program ends
            trainer.save_checkpoint(self.path, weights_only=False)

    def _note(self, signum: int, frame: Any) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
        print("\ninterrupted: ending after this batch; again to end at once", file=sys.stderr)

    def _end_if_pressed(self) -> None:
        if self._pressed:
            raise KeyboardInterrupt

    def _give_back(self) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)
            self._handler_before = None
