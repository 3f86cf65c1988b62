"""Files that are there whole or not at all."""

import os
from pathlib import Path


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
