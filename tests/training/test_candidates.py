"""The contrastive loss with all training targets as candidates, and the learned temperature."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from energy_flow.config import compose
from energy_flow.data import EnergyDataModule
from energy_flow.errors import ConfigError
from tests.training.test_module import make_loader, make_module, make_rows, make_trainer

NUM_ROWS = 24


@pytest.fixture
def data(tmp_path: Path) -> EnergyDataModule:
    rows = make_rows(NUM_ROWS)
    columns = {name: torch.stack([row[name] for row in rows]) for name in ("source", "target")}
    save_file(columns, tmp_path / "pairs.safetensors")
    files = [f"data.{split}={tmp_path / 'pairs.safetensors'}" for split in ("train", "val")]
    return EnergyDataModule.from_config(compose("data=files", *files, "data.batch_size=8"))


class Batches(Callback):
    """Keep the training batches and the losses."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def test_all_training_targets_are_candidates(data: EnergyDataModule) -> None:
    seen = Batches()
    module = make_module("loss.candidates=bank")
    make_trainer(seen, max_steps=1).fit(module, datamodule=data)
    (batch,), (loss,) = seen.batches, seen.losses
    assert data.train is not None
    bank = data.train.all()[1]
    assert torch.equal(bank[batch["row"]], batch["target"])
    output = make_module("loss.candidates=bank").train()(batch["source"], batch["row"]).embedding
    logits = functional.normalize(output, dim=-1) @ bank.T / module.loss.temperature
    assert loss == pytest.approx(functional.cross_entropy(logits, batch["row"]).item(), rel=1e-5)
    of_batch = functional.cross_entropy(logits[:, batch["row"]], torch.arange(len(output))).item()
    assert loss > of_batch + 0.1


def test_the_candidates_are_freed(data: EnergyDataModule) -> None:
    module = make_module("loss.candidates=bank")
    make_trainer(max_steps=1).fit(module, datamodule=data)
    assert not [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    assert all("bank" not in name for name in module.state_dict())


def test_a_learned_temperature(tmp_path: Path) -> None:
    module = make_module("loss.learn_temperature=true", "optimizer.lr=1.0e-2", "optimizer.weight_decay=10.0")
    assert float(module.temperature()) == pytest.approx(0.05)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, make_loader(32))
    # There is no weight decay: with it, the logarithm would change by more than 0.1.
    assert 1e-4 < abs(math.log(float(module.temperature()) / 0.05)) < 0.1
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "it.ckpt")
    assert float(again.temperature()) == float(module.temperature())
    with torch.no_grad():
        module.temperature.log.fill_(-100.0)
    assert float(module.temperature()) == pytest.approx(0.01), "no step may explode"


def test_no_bank_without_its_loss() -> None:
    """A custom loader works if the contrastive term has no weight."""
    module = make_module("loss=mse", "loss.candidates=bank")
    make_trainer().fit(module, make_loader(8))


def test_a_bank_needs_rows_and_training_data(data: EnergyDataModule) -> None:
    with pytest.raises(
        ConfigError, match=r"loss\.candidates = bank: needs the training targets of an EnergyDataModule"
    ):
        make_trainer().fit(make_module("loss.candidates=bank"), make_loader(8))

    class WithoutRows(EnergyDataModule):
        def train_dataloader(self) -> Any:
            batches = [{name: batch[name] for name in ("source", "target")} for batch in super().train_dataloader()]
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"loss\.candidates = bank: batches have no 'row'.*loss\.candidates=batch"):
        make_trainer().fit(make_module("loss.candidates=bank"), datamodule=WithoutRows(data.settings))
