"""Check that memory and open files stay flat, over the steps of one run or over the runs of one process.

    python -m tests.campaigns.flat_memory steps 5000      # at debug size; compares step 500 (a tenth) with the last
    python -m tests.campaigns.flat_memory jobs 200        # a multirun of the smallest models

Further words are overrides: `steps 5000 lattice.width=4 lattice.height=4 model.hidden_size=8` takes minutes on a CPU.

It prints CSV lines and the growth. The exit code is 1 if anything grows by more than 2%.
"""

import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from energy_flow import train
from tests.cli.helpers import words, write_pairs

LIMIT = 0.02
Usage = tuple[int, int, int]  # resident bytes, open files, threads


def usage() -> Usage:
    """Return the usage of this process."""
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), process.num_threads()


class Watch(Callback):
    """Record the usage at every n-th step."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.usages: dict[int, Usage] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.usages[trainer.global_step] = usage()


def steps(number: int, overrides: list[str], folder: Path) -> dict[int, Usage]:
    """Run `number` steps in 25 epochs, with everything but the test. The first tenth has all kinds of steps."""
    watch = Watch(number // 10)
    build = train.build_trainer

    def build_and_watch(*args: Any, callbacks: list[Callback], **kwargs: Any) -> Any:
        return build(*args, callbacks=[*callbacks, watch], **kwargs)

    train.build_trainer = build_and_watch
    own = [
        "size=debug",
        f"trainer.max_steps={number}",
        "trainer.max_epochs=-1",
        f"+trainer.limit_train_batches={number // 25}",
    ]
    own += ["callbacks.early_stopping=null", "test=false", "+trainer.limit_val_batches=1"]
    run(*own, *overrides, folder=folder)
    return watch.usages


def jobs(number: int, overrides: list[str], folder: Path) -> dict[int, Usage]:
    """Run a multirun of `number` tiny runs, with their tests."""
    write_pairs(folder)
    usages: dict[int, Usage] = {}
    inner: Callable[[dict[str, Any]], float | None] = train.train

    def watched_train(config: dict[str, Any]) -> float | None:
        gc.collect()
        usages[len(usages)] = usage()  # before a job, so after all of the previous one
        return inner(config)

    train.train = watched_train
    own = words("train", folder, ())
    run("-m", *own, f"seed=range(1,{number + 1})", *overrides, folder=folder)
    return usages


def run(*arguments: str, folder: Path) -> None:
    """Run the training program in this process."""
    quiet = ("trainer.enable_progress_bar=false", f"paths.log_dir={folder}/logs")
    sys.argv = ["train", *arguments, *(word for word in quiet if word not in arguments)]
    train.main()


def grown(first: Usage, last: Usage) -> dict[str, float]:
    """Return the relative growth of each."""
    names = ("resident memory", "open files", "threads")
    return {name: after / before - 1 for name, before, after in zip(names, first, last, strict=True)}


def main() -> None:
    kind, number, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        usages = {"steps": steps, "jobs": jobs}[kind](int(number), overrides, Path(folder))
    print(f"{kind},resident MiB,open files,threads")
    shown = list(usages)[:: max(1, len(usages) // 10)]
    for index in dict.fromkeys([*shown, max(usages)]):
        resident, files, threads = usages[index]
        print(f"{index},{resident / 2**20:.1f},{files},{threads}")
    start = shown[min(1, len(shown) - 1)] if kind == "jobs" else min(usages)
    growth = grown(usages[start], usages[max(usages)])
    print(", ".join(f"{name} {value:+.2%}" for name, value in growth.items()))
    sys.exit(any(value > LIMIT for value in growth.values()))


if __name__ == "__main__":
    main()
