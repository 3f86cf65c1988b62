"""The trajectories of a tiny trained model follow the field of its data."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from energy_flow.config import compose
from energy_flow.core.flow_processor import FlowOutput
from energy_flow.core.geometry import cell_centres
from energy_flow.data import EnergyDataModule, TransportSettings
from energy_flow.training.module import EnergyFlowModule

TINY = (
    "experiment=transport",
    "data.width=8",
    "data.height=8",
    "data.waves=3",
    "data.train=2000",
    "data.val=50",
    "data.test=50",
    "data.batch_size=32",
    "lattice.depth=4",
    "lattice.movement.scale=0.2",
    "model.features=16",
    "model.hidden_size=16",
    "optimizer.lr=0.02",
    "trainer.max_steps=400",
)


def trained(*overrides: str) -> tuple[FlowOutput, TransportSettings, tuple[Tensor, Tensor]]:
    """The output on the test split after training, the settings of the data, and the split."""
    config = compose(*TINY, *overrides)
    pl.seed_everything(config["seed"], verbose=False)
    data = EnergyDataModule.from_config(config)
    module = EnergyFlowModule.from_config(config, 64)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=config["trainer"]["max_steps"],
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    pairs = data.splits()["test"].all()
    assert isinstance(data.settings, TransportSettings)
    with torch.no_grad():
        return module.eval()(pairs[0], record_trajectories=True), data.settings, pairs


def test_trajectories_follow_the_field() -> None:
    output, settings, (source, target) = trained()
    true, start = settings.landings(source), cell_centres(8, 8, torch.float32, source.device)
    assert output.trajectories is not None
    learned = output.trajectories.position[-1, :, :, :2]
    off, still = (learned - true).norm(dim=-1).mean(), (start - true).norm(dim=-1).mean()
    assert off < 0.35 * still, f"{off:.3f} off, {still:.3f} without movement"
    both = torch.stack([(learned - start).flatten(), (true - start).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    assert (output.embedding - target).square().mean() < 0.15 * target.var()


def test_without_movement_the_field_is_not_learned() -> None:
    output, _, (_, target) = trained("lattice.movement.scale=1.0e-9", "trainer.max_steps=100")
    assert (output.embedding - target).square().mean() > 0.3 * target.var()
