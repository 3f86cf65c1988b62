"""Count how often a training step changes between files of the package: `python -m tests.campaigns.walks --help`.

A hop is a change of file while the call stack runs. `sys.setprofile` reports every call and every return of a Python
function. After each event, take the innermost frame of the package. If its file is not the same as after the previous
event, count one hop. So a call into another file is one hop, and the return from it is another. Frames outside the
package (torch, Lightning, the standard library, generated code) don't count.

The walk is one call of `training_step`, in the second batch, because the first one also fills caches. The model has the
default config: one GRU layer, no noise, no children, learned temperature.
"""

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import energy_flow
from energy_flow.config import compose
from energy_flow.training.module import EnergyFlowModule

PACKAGE = Path(energy_flow.__file__).parent
NUM_STEPS = 4  # T
DIM = 8
SMALL = ("lattice.width=4", "lattice.height=3", "lattice.depth=8", "loss.candidates=batch")


class Walk:
    """The files that a call stack passes through.

    Attributes:
        hops: (from file, to file) -> number of changes.
        files: all files of the walk.
    """

    def __init__(self, package: Path) -> None:
        self._package = f"{package}/"
        self._here: str | None = None
        self.hops: Counter[tuple[str, str]] = Counter()
        self.files: set[str] = set()

    @property
    def num_hops(self) -> int:
        return self.hops.total()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record all calls and returns of this thread inside the `with` block."""
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        inner = frame if event == "call" else frame.f_back
        while inner is not None and not inner.f_code.co_filename.startswith(self._package):
            inner = inner.f_back
        if inner is not None:
            self._visit(inner.f_code.co_filename.removeprefix(self._package))

    def _visit(self, file: str) -> None:
        if self._here not in (None, file):
            self.hops[str(self._here), file] += 1
        self.files.add(file)
        self._here = file


class RecordedModule(EnergyFlowModule):
    """A module that records the walk of its last training step."""

    walk: Walk

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.walk = Walk(PACKAGE)
        with self.walk.record():
            return super().training_step(batch, batch_idx)


def walk_of_training_step(engine: str, *overrides: str) -> Walk:
    """The walk of the second training step of a small model.

    Args:
        engine: `autograd` or `tape`.
        overrides: more of the config, as on the command line.
    """
    config = compose(*SMALL, f"lattice.max_steps={NUM_STEPS}", f"rollout.engine={engine}", *overrides)
    module = RecordedModule.from_config(config, DIM)
    batch = {"source": torch.randn(2, DIM), "target": torch.randn(2, DIM), "row": torch.arange(2)}
    loader: DataLoader = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    return module.walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("walk", choices=["training_step"])
    parser.add_argument("--engine", choices=["autograd", "tape"], default="autograd")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    walk = walk_of_training_step(arguments.engine)
    print(f"{arguments.walk}, {arguments.engine}, T = {NUM_STEPS}: {walk.num_hops} hops, {len(walk.files)} files")
    for (start, end), count in walk.hops.most_common():
        print(f"{count:5}  {start} -> {end}")


if __name__ == "__main__":
    main()
