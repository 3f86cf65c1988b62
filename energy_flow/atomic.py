"""Write files atomically, and compute a digest that shows later whether they are unchanged."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

UNFINISHED = ".unfinished"  # suffix of a file that is being written


@contextmanager
def atomic_writer(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder, and rename it to `path` at the end, if nothing was raised.

    Args:
        keep: the new name of the file that `path` had before; None: it is replaced. A kill between the two renames
            leaves no file at `path`, but the old one here.

    Raises:
        OSError: the path can't be written; the old file is unchanged.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must reach the disk before the name
        if keep is not None and path.is_file():
            os.replace(path, keep)
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file with `atomic_writer`; text as UTF-8."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk as well, so that it survives a power cut."""
    if os.name != "posix":  # Windows can't open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of text and tensors: safetensors has no checksum, so corrupt numbers would load as other numbers."""
    found = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
