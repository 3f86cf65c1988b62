"""The regression task: its metrics, its config and its baselines."""

import math

import pytest
import torch

from energy_flow.comparison.baselines import run_baselines
from energy_flow.comparison.trained_baselines import TrainedBaseline, hidden_size, mlp
from energy_flow.config import compose
from energy_flow.errors import ConfigError
from energy_flow.metrics.task import REGRESSION, RETRIEVAL, direction, regression_metrics, task_of
from tests.comparison.test_baselines import ERRORS, MSE, SETTINGS, epochs, mapped, numbers, rotation, three_splits


def test_metrics_by_hand() -> None:
    prediction = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    found = regression_metrics(prediction, target)
    assert found == pytest.approx({"mse": (0 + 1 + 0 + 1) / 4, "cosine": (1 / math.sqrt(2) + 1) / 2})
    with pytest.raises(ValueError, match="must both be"):
        regression_metrics(prediction, target[:1])


def test_the_metric_determines_the_task() -> None:
    assert task_of("val/mse") is REGRESSION
    assert task_of("val/recall@10") is task_of("val/cosine") is RETRIEVAL
    with pytest.raises(ConfigError, match=r"optimized_metric = 'test/mse': must be one of val/mrr, .*val/mse"):
        task_of("test/mse")
    assert (direction("val/mse"), direction("val/mrr"), direction("nonsense")) == ("min", "max", "max")


def test_better_is_lower_and_anything_is_better_than_nan() -> None:
    assert REGRESSION.improves(0.1, 0.2)
    assert not REGRESSION.improves(0.2, 0.2)
    assert RETRIEVAL.improves(0.2, 0.1)
    for task in (REGRESSION, RETRIEVAL):
        assert task.improves(0.3, math.nan)
        assert not task.improves(math.nan, 0.3)


def test_data_set_their_metric() -> None:
    config = compose("data=transport")
    assert config["data"]["name"] == "transport"
    assert compose("experiment=transport")["loss"]["mse"] == 1.0


def test_the_baselines_of_errors() -> None:
    results = run_baselines(*three_splits(rotation(8)), **ERRORS)
    assert list(results.metrics) == ["identity", "mean", "ridge", "mlp", "residual_mlp", "mlp_large"]
    assert all(metrics.keys() == {"mse", "cosine"} for metrics in results.metrics.values())
    assert results.metrics["identity"] == regression_metrics(*three_splits(rotation(8))[2])


def test_the_mean_target_is_the_best_constant() -> None:
    train, val, test = three_splits(rotation(6))
    found = run_baselines(train, val, test, **ERRORS).metrics["mean"]["mse"]
    assert found == pytest.approx((train[1].mean(0) - test[1]).square().mean().item(), rel=1e-6)


def test_ridge_has_an_intercept_and_the_penalty_of_the_lowest_error() -> None:
    shift = torch.arange(8.0)
    train, val, test = (
        (source + 3, target + shift) for source, target in three_splits(numbers(8, 8, seed=6), noise=0.5)
    )
    train = (train[0][:20], train[1][:20])
    results = run_baselines(train, val, test, **ERRORS)
    centred = [
        (s.double() - train[0].double().mean(0), t.double() - train[1].double().mean(0)) for s, t in (train, val, test)
    ]
    (x, y), (val_x, val_y), (test_x, test_y) = centred
    scale = x.square().sum() / 8

    def solved(exponent: float) -> torch.Tensor:
        return torch.linalg.solve(x.T @ x + scale * 10 ** (exponent / 2) * torch.eye(8).double(), x.T @ y)

    best = min(range(-10, 7), key=lambda exponent: (val_x @ solved(exponent) - val_y).square().mean().item())
    assert -10 < best < 6
    expected = (test_x @ solved(best) - test_y).square().mean().item()
    assert results.metrics["ridge"]["mse"] == pytest.approx(expected, rel=1e-6)
    assert results.metrics["ridge"]["mse"] < 0.5 * results.metrics["mean"]["mse"]


def test_the_large_mlp_is_the_best_pair_on_validation() -> None:
    splits = three_splits(rotation(6).abs())
    grid = {"learning_rates": [1e-5, 1e-2, 3e-3], "weight_decays": [0.0, 0.5]}
    results = run_baselines(*splits, **{**ERRORS, "settings": epochs(5, **grid)})
    errors = {}
    for rate in grid["learning_rates"]:
        for decay in grid["weight_decays"]:
            one = epochs(5, learning_rates=[rate], weight_decays=[decay])
            alone = run_baselines(*splits[:2], splits[1], **{**ERRORS, "settings": one})  # measured on val itself
            errors[rate, decay] = alone.metrics["mlp_large"]["mse"]
    rate, decay = min(errors, key=lambda pair: errors[pair])
    assert len(set(errors.values())) == 6
    assert f"lr {rate:g}, weight decay {decay:g} (val" in results.details["mlp_large"]
    assert results.metrics["mlp_large"]["mse"] < results.metrics["mlp"]["mse"]


def test_the_large_mlp_has_many_times_the_parameters() -> None:
    results = run_baselines(*three_splits(rotation(8)), **{**ERRORS, "settings": epochs(1, large=10)})
    count = hidden_size(8, 5000) * 17 + 8
    assert f"{count:,} parameters" in results.details["mlp_large"]
    assert abs(count - 5000) <= 17 / 2


def test_a_pair_that_diverges_loses() -> None:
    results = run_baselines(
        *three_splits(rotation(6)), **{**ERRORS, "settings": epochs(3, learning_rates=[1e30, 1e-3])}
    )
    assert "lr 0.001," in results.details["mlp_large"]
    assert math.isfinite(results.metrics["mlp_large"]["mse"])


def test_the_learning_rate_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train, val, _ = three_splits(rotation(6))
    TrainedBaseline("mlp", mlp(500), REGRESSION, MSE, epochs(30).training, 1, lambda _: None).fit(train, val)
    assert len(rates) == 30
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-4


def test_without_val_the_choice_is_named() -> None:
    train, _, test = three_splits(rotation(5))
    skipped = run_baselines(train, None, test, **ERRORS).skipped
    assert skipped == {
        "ridge": "needs data.val to select λ by MSE",
        **dict.fromkeys(("mlp", "residual_mlp", "mlp_large"), "needs data.val to select the best epoch by MSE"),
    }


def test_retrieval_has_no_large_mlp() -> None:
    assert (
        "mlp_large"
        not in run_baselines(mapped(rotation(5), 30, 1), None, mapped(rotation(5), 9, 2), **SETTINGS).skipped
    )
