"""Files that are there whole or not at all, and the digest that tells whether they still are."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside `path`, which then takes its place.

    Raises:
        OSError: the path can't be written; what stood there stands there still.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content must not reach the disk later than the name
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that a file says: safetensors has no checksum, and damaged numbers would load as other numbers."""
    found = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
