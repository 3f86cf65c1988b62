"""Files that are there whole or not at all, and the digest that tells whether they still are."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

UNFINISHED = ".unfinished"  # ends the names of files that are being written


@contextmanager
def whole_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write beside `path`; what was written takes its place at the end, if nothing was raised.

    Args:
        keep: where the file that stood there goes; None: it is replaced. A kill between the two renames leaves nothing
            at `path`, but that file here.

    Raises:
        OSError: the path can't be written; what stood there stands there still.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must not reach the disk later than the name
        if keep is not None and path.is_file():
            os.replace(path, keep)
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside `path`, which then takes its place.

    Raises:
        OSError: the path can't be written; what stood there stands there still.
    """
    with whole_file(path) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    """The new name must outlive a power cut, too."""
    if os.name != "posix":  # elsewhere a folder can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that a file says: safetensors has no checksum, and damaged numbers would load as other numbers."""
    found = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
