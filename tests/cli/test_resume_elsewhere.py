"""Resuming from a checkpoint in a new folder, with other settings or other data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow.training.callbacks.best_checkpoint import BestCheckpoint
from tests.cli.helpers import Outcome, Program, check_message, spawn, write_pairs


@pytest.fixture
def first(program: Program) -> Outcome:
    outcome = program.train("trainer.max_epochs=2", "optimizer.lr=0.02")
    assert outcome.code == 0, outcome.err
    return outcome


def load(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def best_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    [state] = [state for key, state in checkpoint["callbacks"].items() if key.startswith(BestCheckpoint.__name__)]
    return state


def resume(program: Program, first: Outcome, *overrides: str) -> Outcome:
    last = first.folder / "checkpoints" / "last.ckpt"
    return program.train("trainer.max_epochs=4", "optimizer.lr=0.02", f"ckpt_path={last}", *overrides)


def test_the_best_checkpoint_is_copied_to_a_new_folder(program: Program, first: Outcome) -> None:
    # A score that no later epoch can reach.
    path = first.folder / "checkpoints" / "last.ckpt"
    checkpoint = load(first.folder, "last")
    best_state(checkpoint)["best_model_score"] = torch.tensor(2.0)
    torch.save(checkpoint, path)
    second = resume(program, first)
    assert (second.code, second.err) == (0, "")
    assert second.folder != first.folder
    assert load(second.folder, "best")["epoch"] == load(first.folder, "best")["epoch"]
    assert load(second.folder, "last")["epoch"] == 3
    assert best_state(load(second.folder, "last"))["best_model_path"] == str(second.folder / "checkpoints/best.ckpt")
    assert second.metrics()["val/mrr"] == 2.0


def test_checkpoints_carry_the_config_of_their_own_run(program: Program, first: Outcome) -> None:
    second = resume(program, first, "trainer.gradient_clip_val=0.5")
    config = load(second.folder, "last")["energy_flow"]["config"]
    assert config["trainer"]["gradient_clip_val"] == 0.5
    assert config["trainer"]["max_epochs"] == 4


def test_another_optimiser_is_refused(program: Program, first: Outcome) -> None:
    outcome = resume(program, first, "optimizer.lr=0.5", "optimizer.weight_decay=0.2")
    assert outcome.code == 1
    check_message(outcome.err)
    assert "optimizer.lr: 0.02 in the checkpoint, 0.5 here" in outcome.err
    assert "optimizer.weight_decay: 0.01 in the checkpoint, 0.2 here" in outcome.err


def test_other_data_are_named(program: Program, first: Outcome) -> None:
    assert "not the data" not in resume(program, first).out
    write_pairs(program.folder, seed=99)
    assert "not the data that the checkpoint was trained with: train, val, test" in resume(program, first).out


def test_evaluation_with_another_normalisation_is_refused(program: Program, first: Outcome) -> None:
    checkpoint = f"ckpt_path={first.folder}/checkpoints/best.ckpt"
    message = program.refused(checkpoint, "data.normalize=false", program="evaluate")
    assert "the model was trained with true. Set data.normalize=true" in message
    assert program.evaluate(checkpoint, "data.normalize=true").code == 0


@pytest.mark.slow
def test_spawned_processes_resume_and_finish(program: Program, first: Outcome) -> None:
    last = first.folder / "checkpoints" / "last.ckpt"
    several = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_spawn")
    second = spawn(
        "train", program.folder, "trainer.max_epochs=3", "optimizer.lr=0.02", f"ckpt_path={last}", *several, check=True
    )
    assert "resuming from step 8" in second.out
    assert 0 < second.metrics()["test/mrr"] <= 1
    assert load(second.folder, "last")["epoch"] == 2
