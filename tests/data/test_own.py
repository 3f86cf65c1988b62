"""Data modules of one's own, as Python gives them: which loaders they have, and which arguments reach them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from energy_flow import targets
from energy_flow.data.own import OwnData, build_data

PAIRS = TensorDataset(torch.ones(4, 3), torch.ones(4, 3))
MODULE = """
from lightning.pytorch import LightningDataModule

class Named(LightningDataModule):
    def __init__(self, seed, batch_size=1):
        super().__init__()
        self.seen = {"seed": seed, "batch_size": batch_size}

    def train_dataloader(self): ...
    def val_dataloader(self): ...

class Passing(Named):
    def __init__(self, seed, **options):
        super().__init__(seed)
        self.seen = options

class Without(Named):
    def __init__(self, seed):
        super().__init__(seed)
        self.seen = {}
"""


@pytest.mark.parametrize("test", [False, True])
def test_loaders_that_are_set_on_the_object(test: bool) -> None:
    """`from_datasets` doesn't define methods in a class."""
    module = LightningDataModule.from_datasets(PAIRS, PAIRS, PAIRS if test else None, batch_size=2)
    data = OwnData(module, "x")
    data.setup("fit")
    assert (data.dim, data.num_batches(), data.has_test) == (3, 2, test)


@pytest.mark.parametrize(
    ("name", "seen"),
    [("Named", {"seed": 5, "batch_size": 7}), ("Passing", {"batch_size": 7}), ("Without", {})],
)
def test_the_batch_size_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seen: dict[str, Any]
) -> None:
    """It reaches a class that takes it, also in `**options`, and is left out for others."""
    (tmp_path / "own_data_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with targets.from_user():
        data = build_data({"seed": 5, "data": {"_target_": f"own_data_module.{name}", "batch_size": 7}})
    assert isinstance(data, OwnData)
    assert data.loaders.seen == seen


class Preparing(LightningDataModule):
    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def train_dataloader(self) -> Any:
        return DataLoader(PAIRS)

    val_dataloader = train_dataloader


def test_every_process_prepares_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the documentation says: none could wait for the first one."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    module = Preparing()
    OwnData(module, "x").setup("fit")
    assert module.calls == ["prepare_data", "fit"]
