"""Write checkpoints to the disk, whole or not at all, and hand a checkpoint that was read to Lightning."""

import logging
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from energy_flow.atomic import atomic_writer
from energy_flow.checkpoints import format as checkpoints
from energy_flow.checkpoints.lightning_loops import carries_weights_back

log = logging.getLogger(__name__)

LAST, BEFORE_LAST = "last.ckpt", "last-1.ckpt"


class LoadedCheckpoint:
    """A checkpoint that was read and verified once, and holds its contents until they are taken or dropped.

    Raises:
        CorruptCheckpointError: the bytes are not those of a checkpoint.
        CheckpointError: missing, or not written by energy_flow.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._stamp = _stamp(self.path)  # before the file is read: one that is replaced meanwhile has another
        self.contents: dict[str, Any] | None = checkpoints.load_without_siblings(self.path)
        self.step = int(self.contents.get("global_step", 0))  # 0 where weights alone were saved

    def take(self, path: str | Path) -> dict[str, Any] | None:
        """Hand the contents on, if they are those of the file at `path` as it is now. They are dropped here, always."""
        contents, self.contents = self.contents, None
        path = Path(path).expanduser()
        unchanged = path == self.path and self._stamp is not None and _stamp(path) == self._stamp
        return contents if unchanged else None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to the disk, with checkpoints that are never half written.

    A checkpoint is written to a temporary file, brought to the disk, and only then renamed; a kill at any time leaves
    the one before. The `last.ckpt` before becomes `last-1.ckpt`. A checkpoint that can't be written is reported and
    doesn't end training. Lightning gets the `loaded` checkpoint instead of a second reading of the same file.
    """

    def __init__(self, loaded: LoadedCheckpoint | None = None) -> None:
        self.failed: dict[str, str] = {}  # path -> reason, of those not written; only on the process that writes
        self._loaded = loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options: checkpoints are files, which have no options")
        path = Path(path)
        self.failed.pop(str(path), None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_writer(path, keep=path.with_name(BEFORE_LAST) if path.name == LAST else None) as file:
                _write(checkpoint, file)
        except OSError as error:
            reason = self.failed[str(path)] = error.strerror or str(error)
            message = "%s: the checkpoint of step %s can't be written (%s). Make room: training continues"
            log.warning(message, path, checkpoint["global_step"], reason)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint on the CPU as `format.load` does, or hand on the loaded one."""
        if carries_weights_back(path):
            return checkpoints.load_weights(Path(path))
        loaded, self._loaded = self._loaded, None
        contents = None if loaded is None else loaded.take(path)
        return checkpoints.load(path) if contents is None else contents


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Changes whenever a file is written or replaced; None: there is no file."""
    if not path.is_file():
        return None
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


class _ErrorKeeper:
    """A file that keeps its own error: torch raises a RuntimeError without the reason."""

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
    """Write part by part: a second copy in memory would be as large as the model and its optimiser."""
    keeper = _ErrorKeeper(file)
    try:
        torch.save(checkpoint, keeper)  # type: ignore[arg-type]  # it needs no more than `write` and `flush`
    except RuntimeError as error:
        if keeper.error is None:
            raise
        raise keeper.error from error
