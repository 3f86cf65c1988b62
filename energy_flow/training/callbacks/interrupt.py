"""Ctrl-C doesn't lose the run."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class SaveOnInterrupt(Callback):
    """Writes a checkpoint when training is interrupted from the keyboard.

    Not in a validation: Lightning can't go on from the middle of one. The checkpoint of the epoch before stays then.

    Args:
        path: the checkpoint; replaces what is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.training:
            trainer.save_checkpoint(self.path, weights_only=False)
