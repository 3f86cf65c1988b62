"""Several processes report the same metrics as one process."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from energy_flow.config import compose
from energy_flow.data import EnergyDataModule
from tests.training.test_module import DIM, TINY, make_module, make_rows

NUM_ROWS = 41  # odd, so two processes measure one row twice


def validate(path: Path, processes: int) -> dict[str, float]:
    config = compose(*TINY, "data=files", f"data.train={path}", f"data.val={path}", "data.eval_batch_size=6")
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_spawn" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    [metrics] = trainer.validate(
        make_module("loss=combined"), datamodule=EnergyDataModule.from_config(config), verbose=False
    )
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_two_processes_report_the_metrics_of_one(tmp_path: Path) -> None:
    rows = make_rows(NUM_ROWS)
    path = tmp_path / "pairs.safetensors"
    save_file({name: torch.stack([row[name] for row in rows]) for name in ("source", "target")}, path)
    assert rows[0]["source"].shape == (DIM,)
    one, two = validate(path, 1), validate(path, 2)
    of_the_split = [name for name in one if "/flows/" not in name]  # statistics of flows are means over batches
    assert len(of_the_split) == 11
    assert {name: two[name] for name in of_the_split} == pytest.approx({n: one[n] for n in of_the_split}, rel=1e-6)
