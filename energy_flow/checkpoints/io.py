"""How checkpoints get to the disk and back: whole, or not at all."""

import logging
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from energy_flow.atomic import whole_file
from energy_flow.checkpoints import format as checkpoints

log = logging.getLogger(__name__)

LAST, BEFORE_LAST = "last.ckpt", "last-1.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to the disk, with checkpoints that are never half.

    A checkpoint is written beside its place, brought to the disk, and only then renamed; a kill at any time leaves the
    one before. The `last.ckpt` before stays as `last-1.ckpt`. Zip's checksum of every part, inside the file, is
    compared when a checkpoint is read. What can't be written is said and doesn't end training.

    Attributes:
        failed: path -> why it couldn't be written, of those that were not written since; on the process that writes.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options: checkpoints are files, there is nothing to choose")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, keep=path.with_name(BEFORE_LAST) if path.name == LAST else None) as file:
                _write(checkpoint, file)
        except OSError as error:
            self.failed[str(path)] = error.strerror or str(error)
            log.warning(
                "%s: the checkpoint of step %s can't be written (%s). Make room: training goes on",
                path,
                checkpoint["global_step"],
                self.failed[str(path)],
            )
            return
        self.failed.pop(str(path), None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """On the CPU, as plain containers; nothing in it can run code.

        Raises:
            CheckpointError: missing, damaged, or not written by energy_flow.
        """
        return checkpoints.load(path)


class _Recorder:
    """A file that keeps its own error: torch makes a RuntimeError without the reason of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Part by part: a second copy in memory would be as large as the model and its optimiser."""
    recorder = _Recorder(file)
    try:
        torch.save(checkpoint, recorder)  # type: ignore[arg-type]  # it needs no more than `write` and `flush`
    except RuntimeError as error:
        if recorder.error is None:
            raise
        raise recorder.error from error
