"""Every Python, JSON and YAML block of the documents works."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from energy_flow.config import compose
from energy_flow.training.module import EnergyFlowModule
from tests.docs.documents import Block, blocks

# Shorter forms: one batch instead of three epochs, and no compilation.
SHORTER = {
    '"size=debug"': '"size=debug", "rollout.compile=false"',
    "pl.Trainer(max_epochs=3)": (
        "pl.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, limit_predict_batches=1, logger=False, "
        "enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu')"
    ),
}


def of_language(language: str) -> list[Any]:
    return [pytest.param(block, id=block.where) for block in blocks() if block.language == language]


@pytest.fixture
def loader() -> DataLoader:
    """The reader's `my_loader`."""
    return DataLoader(TensorDataset(torch.randn(8, 768), torch.randn(8, 768)), batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("block", of_language("python"))
def test_python_runs(block: Block, loader: DataLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if '"best.ckpt"' in block.text:
        save_checkpoint(loader)
    text = block.text
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    assert "max_epochs=3" not in text
    exec(compile(text, block.where, "exec"), {"my_loader": loader})


def save_checkpoint(loader: DataLoader) -> None:
    """Write best.ckpt into the working directory."""
    module = EnergyFlowModule.from_config(compose("loss=in_batch", "lattice.width=3", "lattice.height=3"), dim=768)
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint("best.ckpt")


@pytest.mark.parametrize("block", of_language("json"))
def test_json_is_json(block: Block) -> None:
    assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("block", of_language("yaml"))
def test_yaml_is_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text)
