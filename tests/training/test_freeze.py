"""Frozen parts keep their initial weights; all other parts are trained."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.training.module import EnergyFlowModule
from tests.training.test_module import LIVELY, make_loader, make_module, make_trainer

FROZEN = "optimizer.freeze=[carrier]"


def changed(module: EnergyFlowModule, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.named_parameters() if not torch.equal(value.detach().cpu(), before[name])}


def values(module: EnergyFlowModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("engine", ["tape", "autograd"])
def test_frozen_parts_stay_and_the_others_learn(engine: str) -> None:
    module = make_module(*LIVELY, FROZEN, "optimizer.weight_decay=0.5", f"rollout.engine={engine}")
    before = values(module)
    carrier = {name for name in before if name.startswith("processor.carrier.")}
    make_trainer().fit(module, make_loader(32))
    assert carrier
    assert changed(module, before) == set(before) - carrier
    assert module.num_frozen == sum(before[name].numel() for name in carrier)


def test_nothing_is_frozen_by_default() -> None:
    module = make_module()
    assert module.num_frozen == 0
    assert sorted(module.processor.trained_parts()) == ["carrier", "map_in", "map_out", "neuron"]


def test_unknown_parts() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.freeze\[1\] = 'carier': no part with .*did you mean carrier\?"):
        make_module("optimizer.freeze=[neuron,carier]")
    with pytest.raises(ConfigError, match="known: carrier, map_in, map_out, neuron"):
        make_module("optimizer.freeze=[everything]")
    identity = ("model.maps=identity", "lattice.width=3", "lattice.height=2", "model.energy_dim=2")
    with pytest.raises(ConfigError, match="known: carrier, neuron"):
        make_module(*identity, "optimizer.freeze=[xyz]")
    with pytest.raises(ConfigError, match=r"leaves nothing to train. Take a part out of it"):
        make_module(*identity, "optimizer.freeze=[carrier,neuron]")


def test_a_resumed_run_keeps_frozen_parts(tmp_path: Path) -> None:
    module = make_module(FROZEN)
    before = values(module)
    trainer = make_trainer()
    trainer.fit(module, make_loader(16))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    other = make_module(FROZEN, "optimizer.lr=1.0e-3")
    for parameter in other.processor.carrier.parameters():
        torch.nn.init.zeros_(parameter)
    make_trainer(max_epochs=2).fit(other, make_loader(16), ckpt_path=path, weights_only=True)
    carrier = {name for name in before if name.startswith("processor.carrier.")}
    assert changed(other, before) == set(before) - carrier
    with pytest.raises(CheckpointError, match=r"optimizer.freeze: \['carrier'\] in the checkpoint, \[\] here"):
        compatibility.check_resume(checkpoints.load(path), make_module().hparams, path)


@pytest.mark.slow
def test_several_processes_train_the_other_parts() -> None:
    module = make_module(FROZEN)
    before = values(module)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, make_loader(32))
    carrier = {name for name in before if name.startswith("processor.carrier.")}
    assert changed(module, before) == set(before) - carrier


def test_resuming_from_a_checkpoint_without_the_key() -> None:
    saved = {"dim": 4, "lattice": {}, "model": {}, "optimizer": {"lr": 0.1}}
    checkpoint = {"optimizer_states": [], "hyper_parameters": saved}
    compatibility.check_resume(checkpoint, {**saved, "optimizer": {"lr": 0.1, "freeze": []}}, "old.ckpt")
    with pytest.raises(CheckpointError, match=r"optimizer\.freeze: None in the checkpoint, \['carrier'\] here"):
        compatibility.check_resume(checkpoint, {**saved, "optimizer": {"lr": 0.1, "freeze": ["carrier"]}}, "old.ckpt")
