"""Show the stage of a run to other processes."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class StageFile(Callback):
    """Write the stage of the run into a file."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def on_train_batch_start(self, *args: Any) -> None:
        self._file.write_text("training")

    def on_validation_start(self, *args: Any) -> None:
        self._file.write_text("validation")

    def on_train_end(self, *args: Any) -> None:
        self._file.write_text("after training")
