"""A tiny Lightning run for tests of callbacks, and a reader of its logs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow.core.timing import PhaseTimer
from energy_flow.settings import read
from tests.helpers import DIM, LATTICE, MODEL, section

# The package raises no warnings. These are Lightning's warnings about tiny runs and about torch.
NO_WARNINGS = pytest.mark.filterwarnings(
    "error",
    "ignore:.*does not have many workers",
    "ignore:.*have no `val_dataloader`",
    "ignore:.*LeafSpec.*deprecated",
    "ignore:GPU available but not used",
)

Scalars = dict[str, list[tuple[int, float]]]


class Pairs(Dataset):
    """Rows with the shapes of `EnergyDataModule`."""

    def __init__(self, size: int) -> None:
        self.source = torch.nn.functional.normalize(torch.randn(size, DIM), dim=-1)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"source": self.source[index], "target": -self.source[index], "row": index}


class TinyModule(LightningModule):
    """A processor in a training loop, and nothing else."""

    def __init__(self, **lattice: Any) -> None:
        super().__init__()
        self.phase_timer: PhaseTimer | None = None
        settings = read(LatticeSettings, section(LATTICE, lattice), "lattice")
        self.processor = FlowProcessor(DIM, settings, read(ModelSettings, MODEL, "model"), seed=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.processor(batch["source"], batch["row"], timer=self.phase_timer)
        return (output.embedding - batch["target"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.processor(batch["source"], batch["row"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(folder, name="", version=""),
        "callbacks": list(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **options})


def loader(num_batches: int) -> DataLoader:
    return DataLoader(Pairs(2 * num_batches), batch_size=2)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path) -> Scalars:
    """Tag -> (step, value) of every scalar."""
    accumulator = events(folder)
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }
