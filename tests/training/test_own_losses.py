"""Loss terms of one's own, `loss.terms`."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from energy_flow import targets
from energy_flow.comparison.baselines import BaselineResults, BaselineSettings, run_baselines
from energy_flow.comparison.trained_baselines import TrainingSettings
from energy_flow.config import compose
from energy_flow.errors import CheckpointError, ConfigError
from energy_flow.metrics.task import REGRESSION
from energy_flow.settings import read
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule
from tests.training.test_module import DIM, make_module, make_rows, make_trainer

ALONE = ("loss.contrastive=0", "+loss.terms.own.weight=1.0")  # no shipped term is trained
OWN = "tests.training.own_terms"


def own_module(name: str, *overrides: str) -> EnergyFlowModule:
    with targets.from_user():
        return make_module(f"+loss.terms.own._target_={OWN}.{name}", *overrides)


def loader(num_rows: int = 24, batch_size: int = 8) -> DataLoader:
    """Batches with an entry of their own."""
    rows = [{**row, "importance": torch.tensor(float(index % 3))} for index, row in enumerate(make_rows(num_rows))]
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def fit(module: EnergyFlowModule, **options: Any) -> dict[str, float]:
    trainer = make_trainer(**options)
    trainer.fit(module, loader(), loader(20))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_term_is_the_loss() -> None:
    """With a weight of 1 and large delta it is half the squared error, so both train the same."""
    own = own_module("Huber", *ALONE, "+loss.terms.own.delta=1000")
    shipped = make_module("loss=mse", "loss.mse=0.5", "loss.candidates=batch")
    metrics = fit(own)
    assert fit(shipped)["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-6)
    assert metrics["val/own"] == pytest.approx(0.5 * metrics["val/mse"], rel=1e-6)
    assert own.state_dict().keys() == shipped.state_dict().keys(), "a term without parameters adds no key"


def test_a_term_beside_a_shipped_one() -> None:
    metrics = fit(own_module("Huber", "+loss.terms.own.weight=2.0"))
    assert metrics["val/loss"] == pytest.approx(metrics["val/contrastive"] + 2 * metrics["val/own"], rel=1e-6)


def test_a_term_of_weight_0_is_reported() -> None:
    module = own_module("Learned", "+loss.terms.own.weight=0")
    before = module.terms.own.map.weight.detach().clone()
    metrics = fit(module)
    assert metrics["val/loss"] == pytest.approx(metrics["val/contrastive"])
    assert metrics["val/own"] > 0
    assert torch.equal(module.terms.own.map.weight, before)


def test_a_term_with_parameters_is_trained_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = own_module("Learned", *ALONE)
    before = module.terms.own.map.weight.detach().clone()
    trainer = make_trainer()
    trainer.fit(module, loader(), loader())
    assert not torch.equal(module.terms.own.map.weight, before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setenv(targets.TRUST, "tests")
    again = EnergyFlowModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again.terms.own.map.weight, module.terms.own.map.weight)


def test_a_file_may_not_name_a_term(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.fit(own_module("Huber", *ALONE), loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"loss\.terms\.own\._target_ = .*Huber: refused.*ENERGY_FLOW_TRUST"):
        EnergyFlowModule.load_from_checkpoint(tmp_path / "last.ckpt")


def test_further_entries_reach_the_term() -> None:
    """A row of weight 0 counts for nothing; rows of an incomplete batch count as all others."""
    module = own_module("WeightedError", *ALONE)
    fit(module)
    rows = make_rows(20)
    source, target = (torch.stack([row[name] for row in rows]) for name in ("source", "target"))
    with torch.no_grad():
        error = (module.eval()(source).embedding - target).square().mean(1)
    expected = float((error * (torch.arange(20) % 3)).mean())
    assert float(module.trainer.validate(module, loader(20), verbose=False)[0]["val/own"]) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("PerSample", r"loss\.terms\.own: returned a torch\.float32 tensor of shape \[8\]: return a floating-point"),
        ("Detached", r"loss: the terms .*own have no gradient.*without \.detach\(\)"),
    ],
)
def test_a_wrong_result(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(own_module(name, *ALONE))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OneArgument", r"loss\.terms\.own\._target_ = .*: can't be called as term\(output, batch\): too many"),
        ("NotCallable", r"loss\.terms\.own\._target_ = .*: gives a NotCallable, which can't be called"),
        ("Hubber", r"loss\.terms\.own\._target_ = .*: there is no such class"),
    ],
)
def test_not_a_term(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own_module(name, *ALONE)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"mse": {}}, r"loss\.terms\.mse: must be a name .* none of cosine, mse"),
        ({"my.term": {}}, r"loss\.terms\.my\.term: must be a name of letters, digits and _"),
        ({"own": {"weight": -1}}, r"loss\.terms\.own\.weight = -1: must be a finite number of at least 0"),
        ({"own": {"weight": True}}, r"loss\.terms\.own\.weight = True: must be a finite number"),
    ],
)
def test_a_wrong_section(term: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(LossSettings, {**compose()["loss"], "terms": term}, "loss")


def test_a_module_may_not_have_the_name_of_an_attribute() -> None:
    with targets.from_user(), pytest.raises(ConfigError, match=r"loss\.terms\.half: .*Choose another name"):
        make_module(f"+loss.terms.half._target_={OWN}.Huber")


def test_not_a_number_is_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    module = own_module("NotANumber", *ALONE)
    before = {name: value.clone() for name, value in module.processor.named_parameters()}
    with caplog.at_level(logging.WARNING):
        fit(module, limit_val_batches=0)
    assert "NaN in the loss.terms.own" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in module.processor.named_parameters())


def baselines_with(**loss: Any) -> BaselineResults:
    section = {**compose("loss=mse")["loss"], **loss}
    training = TrainingSettings(epochs=1, learning_rates=[1e-3], weight_decays=[0.0])
    rows = [torch.stack([row[name] for row in make_rows(32)]) for name in ("source", "target")]
    pairs = (rows[0], rows[1])
    return run_baselines(
        pairs,
        pairs,
        pairs,
        task=REGRESSION,
        settings=BaselineSettings(enabled=True, training=training, large=2),
        num_parameters=500,
        loss=read(LossSettings, section, "loss"),
        seed=1,
    )


def test_baselines_say_which_terms_they_lack() -> None:
    terms = {"own": {"_target_": f"{OWN}.Huber"}, "reported": {"_target_": f"{OWN}.Huber", "weight": 0.0}}
    found = baselines_with(terms=terms)
    assert found.details["mlp"].endswith("; trained without loss.terms.own")
    assert found.metrics == baselines_with().metrics


def test_baselines_without_a_loss_are_left_out() -> None:
    found = baselines_with(terms={"own": {"_target_": f"{OWN}.Huber"}}, mse=0.0)
    assert set(found.skipped) == {"mlp", "residual_mlp", "mlp_large"}
    assert found.skipped["mlp"] == "only loss.terms.own would train it, with the output of a flow lattice"
    assert "ridge" in found.metrics


def test_dimensions_reach_the_term() -> None:
    assert own_module("Learned", *ALONE).terms.own.map.in_features == DIM
