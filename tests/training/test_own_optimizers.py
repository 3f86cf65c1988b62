"""Optimisers and schedules of one's own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from energy_flow import targets
from energy_flow.config import compose
from energy_flow.errors import ConfigError
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.optimizer import SkippingAdamW
from tests.training.test_module import make_loader, make_module, make_rows, make_trainer

OWN = "tests.training.own_optimizers"
ADAM = "torch.optim.Adam"
NAMES = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adafactor", "Rprop")


def own_module(name: str, **schedule: Any) -> EnergyFlowModule:
    path = name if "." in name else f"torch.optim.{name}"
    return module_with({"_target_": path, "lr": 0.01, "freeze": [], "schedule": schedule or None})


def module_with(optimizer: dict[str, Any]) -> EnergyFlowModule:
    hparams = {**make_module().hparams, "optimizer": optimizer}
    with targets.from_user():
        torch.manual_seed(0)
        return EnergyFlowModule(**hparams)


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


class Stop(Callback):
    """Ends a run after four batches."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


def fit(module: EnergyFlowModule, *callbacks: Callback, loader: Any = None, **options: Any) -> Trainer:
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **options})
    trainer.fit(module, loader or make_loader(24))
    return trainer


def bad_loader() -> DataLoader:
    """The second of three batches isn't finite."""
    rows = make_rows(24)
    rows[9]["target"] = rows[9]["target"] * torch.nan
    return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


class States(Callback):
    """Keeps weights and state of the optimiser after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        weights = dict(module.named_parameters())
        self.seen.append(copy.deepcopy({**weights, "state": trainer.optimizers[0].state_dict()["state"]}))


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_step_is_skipped(name: str) -> None:
    """Neither weights nor state change in it; they change in the steps before and after."""
    module, states = own_module(name), States()
    fit(module, states, loader=bad_loader(), max_epochs=1)
    assert module.guard.skipped == 1
    first, second, third = states.seen
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    weight = "processor.carrier.energy_head.weight"
    assert not torch.equal(third[weight], second[weight])


def test_a_skipped_step_calls_nothing() -> None:
    """Also of an optimiser that counts its steps apart from the parameters."""
    trainer = fit(own_module(f"{OWN}.Counting"), loader=bad_loader(), max_epochs=1)
    assert trainer.optimizers[0].param_groups[0]["count"] == 2


def test_it_trains_as_torch_does() -> None:
    """One step of SGD by hand; biases don't decay."""
    module = own_module("SGD")
    module.optimizer_settings.entry["weight_decay"] = 0.5
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    fit(module, max_steps=1)
    for name, p in module.named_parameters():
        assert p.grad is not None
        decay = 0.5 if p.ndim > 1 and not name.endswith("cell_value") else 0.0
        torch.testing.assert_close(p.detach(), before[name] - 0.01 * (p.grad + decay * before[name]), msg=name)


@pytest.mark.parametrize("name", ["SGD", "Adam", f"{OWN}.Counting"])
def test_a_run_resumes_exactly(tmp_path: Path, name: str) -> None:
    schedule = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "cycle_momentum": False}

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    def run(folder: str, *callbacks: Callback, **options: Any) -> dict[str, Any]:
        last = ModelCheckpoint(tmp_path / folder, "last", enable_version_counter=False)
        module = own_module(name, **schedule)
        trainer = make_trainer(last, *callbacks, max_epochs=4, limit_val_batches=0, enable_checkpointing=True)
        trainer.fit(module, make_loader(24), weights_only=True, **options)
        return dict(torch.load(tmp_path / folder / "last.ckpt", weights_only=True))

    whole = run("whole")
    run("first", Stop())
    second = run("second", ckpt_path=tmp_path / "first" / "last.ckpt")
    torch.testing.assert_close(second["state_dict"], whole["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer_states"], whole["optimizer_states"], rtol=0, atol=0)
    assert second["lr_schedulers"] == whole["lr_schedulers"]


def test_a_schedule_for_the_default() -> None:
    rates = Rates()
    module = make_module(
        "+optimizer.schedule._target_=torch.optim.lr_scheduler.StepLR", "+optimizer.schedule.step_size=2"
    )
    trainer = fit(module, rates)
    assert isinstance(trainer.optimizers[0], SkippingAdamW)
    assert rates.seen == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_a_schedule_of_a_users_own_gets_the_number_of_steps() -> None:
    rates = Rates()
    fit(own_module("SGD", _target_=f"{OWN}.Halved"), rates)
    assert rates.seen == pytest.approx([0.01] * 3 + [0.005] * 3)


def test_a_schedule_that_knows_no_end_in_a_run_without_one() -> None:
    rates = Rates()
    module = own_module("SGD", _target_="torch.optim.lr_scheduler.ExponentialLR", gamma=0.5)
    fit(module, rates, Stop(), max_epochs=-1)
    assert rates.seen == pytest.approx([0.01 * 0.5**step for step in range(4)])


def test_a_schedule_that_needs_an_end_is_refused_in_a_run_without_one() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs = -1: .*Set trainer\.max_epochs or trainer\.max_steps"):
        fit(own_module("SGD", _target_=f"{OWN}.Halved"), max_epochs=-1)


def test_without_a_schedule_the_rate_is_constant() -> None:
    rates = Rates()
    fit(own_module("SGD"), rates)
    assert rates.seen == [0.01] * 6


def test_the_shipped_option_has_the_schedule_of_adamw() -> None:
    rates, expected = Rates(), Rates()
    section = compose("optimizer=sgd")["optimizer"]
    fit(module_with({**section, "schedule": {**section["schedule"], "warmup_steps": 3}}), rates)
    fit(make_module(), expected)
    assert [rate / 0.1 for rate in rates.seen] == pytest.approx([rate / 1e-3 for rate in expected.seen])


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("LBFGS", {}, r"optimizer: ValueError: LBFGS doesn't support per-parameter options"),
        (f"{OWN}.Searching", {}, r"optimizer\._target_: Searching computes the loss several times in a step"),
        ("torch.nn.ReLU", {}, r"optimizer\.lr: unknown key"),
        ("Adamm", {}, r"optimizer\._target_ = torch\.optim\.Adamm: there is no such class"),
        ("SGD", {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, r"optimizer\.schedule: .*steps alone"),
        ("SGD", {"_target_": "torch.optim.lr_scheduler.StepLR"}, r"optimizer\.schedule\.step_size: .* needs this"),
    ],
)
def test_what_cannot_work(name: str, schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(own_module(name, **schedule))


def test_a_file_may_not_name_an_optimizer() -> None:
    """Of another package than torch: a module that was built outside of the user's config is from a file."""
    hparams = dict(own_module(f"{OWN}.Counting").hparams)
    with pytest.raises(ConfigError, match=r"optimizer\._target_ = .*Counting: refused.*ENERGY_FLOW_TRUST"):
        fit(EnergyFlowModule(**hparams))
