"""Several bad steps in a row end a run, which saves batch and state for the search of the cause."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from energy_flow.errors import ConfigError, NotFiniteError
from energy_flow.training.callbacks.bad_steps import StopOnBadSteps
from energy_flow.training.callbacks.best_checkpoint import BestCheckpoint
from energy_flow.training.module import EnergyFlowModule
from tests.helpers import tensors_of
from tests.training.test_module import DIM, LIVELY, make_module, make_rows, make_trainer

BATCH = 8


def loader(steps: int, bad: set[int]) -> DataLoader:
    """Batches in order. The batches of `bad` steps have a NaN in one row."""
    rows = make_rows(BATCH * steps)
    for step in bad:
        rows[BATCH * step + 3]["source"][2] = torch.nan
    return DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]


class StateAfter(Callback):
    """Keep weights and moments after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.state = steps, dict[str, Tensor]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            optimizer = tensors_of(trainer.optimizers[0].state_dict()["state"])
            self.state = {name: value.clone() for name, value in {**pl_module.state_dict(), **optimizer}.items()}


def fit(folder: Path, steps: int, bad: set[int], *callbacks: Callback, limit: int = 3) -> EnergyFlowModule:
    module = make_module(*LIVELY, "optimizer.lr=1.0e-2")
    trainer = make_trainer(*callbacks, StopOnBadSteps(folder, limit), gradient_clip_val=1.0)
    trainer.fit(module, loader(steps, bad))
    return module


def test_the_state_from_before_the_fault_and_its_batch_are_kept(tmp_path: Path) -> None:
    """The host learns of the last bad step one step later. That later step is good, but must be skipped too."""
    before = StateAfter(2)
    with pytest.raises(NotFiniteError) as caught:
        fit(tmp_path, 9, {2, 3, 4}, before)
    path, file = tmp_path / "checkpoints" / "before_fault.ckpt", tmp_path / "bad_batch.safetensors"
    message = str(caught.value)
    assert "3 steps in a row were skipped" in message
    assert "step 2: NaN in the source (rows 19 of the training data)" in message
    for part in (str(path), str(file), "optimizer.lr", "debug=anomaly", "max_bad_steps"):
        assert part in message
    checkpoint = torch.load(path, weights_only=True)
    found = {**checkpoint["state_dict"], **tensors_of(checkpoint["optimizer_states"][0]["state"])}
    assert found.keys() == before.state.keys()
    for name, value in before.state.items():
        assert name == "processor.optimizer_step" or torch.equal(found[name], value), name
    expected = next(iter(DataLoader(make_rows(72)[16:24], batch_size=BATCH)))  # type: ignore[arg-type]
    expected["source"][3, 2] = torch.nan
    saved = load_file(file)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {
            "step": "2",
            "reason": "NaN in the source",
            "where": "rows 19 of the training data",
        }


def test_training_resumes_from_the_state_before_the_fault(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError):
        fit(tmp_path, 12, {1, 3, 4, 5})
    stop, module = StopOnBadSteps(tmp_path, 3), make_module(*LIVELY, "optimizer.lr=1.0e-2")
    trainer = make_trainer(stop)
    trainer.fit(module, loader(12, set()), ckpt_path=tmp_path / "checkpoints" / "before_fault.ckpt", weights_only=True)
    assert trainer.global_step == 12
    assert module.guard.skipped == 4, "counted on"
    assert {float(entry["step"]) for entry in trainer.optimizers[0].state.values()} == {12.0 - 5}


def test_a_good_step_resets_the_count(tmp_path: Path) -> None:
    module = fit(tmp_path, 8, {0, 1, 3, 4, 6, 7})
    assert (module.guard.skipped, module.guard.in_row, module.guard.limit) == (6, 2, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [3, 4])
def test_bad_steps_at_the_end_of_training(steps: int, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="3 steps in a row"):
        fit(tmp_path, steps, set(range(steps - 3, steps)))


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_below_one_is_refused(value: int, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"callbacks\.bad_steps\.max_bad_steps = {value}: should be greater than or equal to 1; null"
    ):
        StopOnBadSteps(tmp_path, value)


class Scores(LightningModule):
    """A module with given validation scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/mrr", self.scores[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_score_of_nan_is_never_the_best(mode: str, tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.zeros(1, DIM)))
    scores = [torch.nan, 0.5, torch.nan, 0.5]
    best = BestCheckpoint(dirpath=tmp_path, filename="best", monitor="val/mrr", mode=mode, enable_version_counter=False)
    make_trainer(best, max_epochs=4, enable_checkpointing=True).fit(Scores(scores), data, data)
    assert best.best_model_score == 0.5
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 1
    early = EarlyStopping(monitor="val/mrr", mode=mode)
    make_trainer(early, max_epochs=4).fit(Scores([0.5, torch.nan, 0.5, 0.5]), data, data)
    assert early.stopped_epoch == 1
