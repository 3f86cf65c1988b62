"""Lightning's weight averaging: the step count, tests with the averages, and a resumed run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from energy_flow.checkpoints.weight_averaging import STEPS, TRAINED
from energy_flow.training.module import EnergyFlowModule
from tests.training.test_module import make_loader, make_module, make_trainer

SLOW = "lattice.movement.warmup_steps=10"  # the scale, and so every result, depends on the step count


class SaveInValidation(pl.Callback):
    """Saves a checkpoint in the first batch of every validation, as an interrupted run does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.training or trainer.validating:
            trainer.save_checkpoint(self.path)


class Stop(pl.Callback):
    """Ends a run after its second epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


class Overriding(EMAWeightAveraging):
    """Swaps in a hook of its own."""

    def on_validation_epoch_start(self, *arguments: Any) -> None:
        super().on_validation_epoch_start(*arguments)


class NotSwapping(EMAWeightAveraging):
    """Validates the trained weights."""

    def on_validation_epoch_start(self, *_: Any) -> None:
        pass

    on_validation_epoch_end = on_validation_epoch_start


def fit(
    folder: Path,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    max_epochs: int = 2,
    kind: type[EMAWeightAveraging] = EMAWeightAveraging,
) -> pl.Trainer:
    last = ModelCheckpoint(folder, "last", enable_version_counter=False)
    averaging = kind(decay=0.7)
    trainer = make_trainer(averaging, last, *callbacks, max_epochs=max_epochs, enable_checkpointing=True)
    module = make_module(SLOW, "loss.learn_temperature=true")
    trainer.fit(module, make_loader(24), make_loader(8), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def read(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


def test_a_checkpoint_counts_the_steps(tmp_path: Path) -> None:
    fit(tmp_path)
    saved = read(tmp_path / "last.ckpt")
    assert saved["global_step"] == 6
    assert saved["state_dict"][STEPS].item() == saved[TRAINED][STEPS].item() == 6
    assert not torch.equal(
        saved["state_dict"]["processor.carrier.energy_head.weight"],
        saved[TRAINED]["processor.carrier.energy_head.weight"],
    ), "averages and trained weights"


def test_an_older_checkpoint_with_an_averaged_count(tmp_path: Path) -> None:
    fit(tmp_path)
    path = tmp_path / "last.ckpt"
    saved = read(path)
    for section in ("state_dict", TRAINED):
        saved[section][STEPS].fill_(2)
    torch.save(saved, path)
    assert int(EnergyFlowModule.load_from_checkpoint(path).processor.optimizer_step) == 6


def test_every_test_has_the_averages(tmp_path: Path) -> None:
    """After the fit, of its checkpoint, and of the checkpoint without the callback."""
    trainer = fit(tmp_path)
    module, loader, path = trainer.lightning_module, make_loader(16), tmp_path / "last.ckpt"
    after = trainer.test(module, loader, verbose=False)[0]
    of_checkpoint = trainer.test(module, loader, ckpt_path=path, weights_only=True, verbose=False)[0]
    loaded = EnergyFlowModule.load_from_checkpoint(path)
    alone = make_trainer().test(loaded, loader, verbose=False)[0]
    assert after == of_checkpoint == alone
    assert read(path)[TRAINED]["temperature.log"] != loaded.temperature.log, "or this test couldn't fail"


def test_a_validation_has_the_temperature_of_its_weights(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    validated = float(trainer.callback_metrics["val/contrastive"])
    tested = trainer.test(trainer.lightning_module, make_loader(8), verbose=False)[0]["test/contrastive"]
    assert validated == pytest.approx(tested, rel=1e-6)


def test_a_run_resumes_without_the_callback_from_the_trained_weights(tmp_path: Path) -> None:
    fit(tmp_path)
    saved = read(tmp_path / "last.ckpt")
    seen: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.update({name: value.detach().clone() for name, value in pl_module.state_dict().items()})

    trainer = make_trainer(Look(), max_epochs=3)
    trainer.fit(
        make_module(SLOW, "loss.learn_temperature=true"),
        make_loader(24),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=True,
    )
    assert_equal(seen, saved[TRAINED])


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    fit(tmp_path / "whole", max_epochs=4)
    fit(tmp_path / "first", Stop(), max_epochs=4)
    fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last.ckpt", max_epochs=4)
    whole, second = (read(tmp_path / name / "last.ckpt") for name in ("whole", "second"))
    assert_equal(second["state_dict"], whole["state_dict"])
    assert_equal(second[TRAINED], whole[TRAINED])


@pytest.mark.parametrize("kind", [EMAWeightAveraging, Overriding, NotSwapping])
def test_a_checkpoint_in_a_validation(tmp_path: Path, kind: type[EMAWeightAveraging]) -> None:
    """Lightning has swapped the weights then; the checkpoint has each set in its own place."""
    path = tmp_path / "within.ckpt"
    fit(tmp_path, SaveInValidation(path), kind=kind)
    within, after = read(path), read(tmp_path / "last.ckpt")
    assert within["global_step"] == after["global_step"]
    assert_equal(within["state_dict"], after["state_dict"])
    assert_equal(within[TRAINED], after[TRAINED])


def test_a_validation_after_the_fit(tmp_path: Path) -> None:
    """The callback swaps the weights there, too."""
    trainer = fit(tmp_path)
    module, loader = trainer.lightning_module, make_loader(8)
    tested = trainer.test(module, loader, verbose=False)[0]
    trainer.callbacks[0]._average_model.module.processor.optimizer_step.fill_(2)
    validated = trainer.validate(module, loader, verbose=False)[0]
    assert validated["val/loss"] == tested["test/loss"]
