"""Count how often a run with `resume=auto` opens each checkpoint for reading.

    python -m tests.campaigns.checkpoint_reads                  # after a kill
    python -m tests.campaigns.checkpoint_reads --corrupt-last   # and with a corrupt last.ckpt: the one before is used

A run is killed after its first checkpoint and resumed in this process. Two counters notice every way to open a file.
One is an audit hook of Python, which every `open` and `os.open` calls. The other wraps torch's C++ reader, which opens
paths by itself.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from energy_flow.train import main as train_main
from tests.cli.helpers import start, wait_for, words, write_pairs

RUN = ("trainer.max_epochs=30", "callbacks.early_stopping=null")

_counting: list[Counter[str]] = []  # an audit hook can't be removed; it counts into these


def _is_checkpoint(path: Any) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).endswith(".ckpt")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counting and _is_checkpoint(arguments[0]):
        _, mode, flags = arguments
        reads = mode.startswith("r") if isinstance(mode, str) else not flags & (os.O_WRONLY | os.O_RDWR)
        for counter in _counting if reads else ():
            counter[Path(os.fsdecode(arguments[0])).name] += 1


sys.addaudithook(_audit)


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Count how often this process opens each checkpoint for reading, by file name."""
    counter: Counter[str] = Counter()
    reader = torch._C.PyTorchFileReader

    def counted_reader(source: Any) -> Any:
        if _is_checkpoint(source):
            counter[Path(os.fsdecode(source)).name] += 1
        return reader(source)

    torch._C.PyTorchFileReader = counted_reader  # type: ignore[assignment, misc]
    _counting.append(counter)
    try:
        yield counter
    finally:
        _counting.remove(counter)
        torch._C.PyTorchFileReader = reader  # type: ignore[misc]


def reads_of_resume(folder: Path, *, corrupt_last: bool = False) -> Counter[str]:
    """Kill a run in a folder, resume it with `resume=auto`, and count how often that opens each checkpoint."""
    write_pairs(folder, seed=1)
    process = start("train", folder, *RUN)
    wait_for(process, lambda: list(folder.glob("logs/train/runs/*/checkpoints/last-1.ckpt")))
    process.kill()
    process.communicate()
    [last] = folder.glob("logs/train/runs/*/checkpoints/last.ckpt")
    if corrupt_last:
        last.write_bytes(last.read_bytes()[:-1000])
    sys.argv = ["train", *words("train", folder, (*RUN, "resume=auto"))]
    with counted_reads() as counter:
        train_main()
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corrupt-last", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counter = reads_of_resume(Path(folder), corrupt_last=arguments.corrupt_last)
    for name, count in sorted(counter.items()):
        print(f"{name}: opened {count} time{'s' * (count != 1)}")
    sys.exit(0 if counter and max(counter.values()) == 1 else 1)


if __name__ == "__main__":
    main()
