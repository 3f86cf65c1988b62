"""Comparison of tested models: means, intervals, pairs, keys of metrics.json, short names, the table."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from energy_flow.comparison.compare import (
    ALONE,
    MEAN,
    Comparison,
    Method,
    best_baseline,
    flat_metrics,
    mean_model,
    pairs_of,
)
from energy_flow.comparison.report import interval_table
from energy_flow.metrics.bootstrap import Interval, mean_interval
from energy_flow.metrics.task import REGRESSION, RETRIEVAL
from energy_flow.runs.models import short_names
from tests.comparison.sweeps import paired_difference


def scores(num_rows: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, num_rows, generator=generator, dtype=torch.float64) + shift


def method(key: str, num_rows: int, seed: int, shift: float = 0.0, *, is_baseline: bool = False) -> Method:
    values = scores(num_rows, seed, shift)
    metrics = {"mrr": values.mean().item(), "median_rank": float(seed)}
    return Method(key, ALONE if key == "model" else key, is_baseline, metrics, values)


def one(num_rows: int = 50) -> Comparison:
    baselines = [method(key, num_rows, seed, is_baseline=True) for key, seed in (("mean", 2), ("mlp", 3))]
    return Comparison(RETRIEVAL, [method("model", num_rows, 1), *baselines])


def several() -> Comparison:
    models = [method("a", 50, 1), method("b", 50, 2, 0.2), method("c", 50, 3, 0.4)]
    baselines = [method("mean", 50, 4, -0.3, is_baseline=True), method("mlp", 50, 5, 0.1, is_baseline=True)]
    return Comparison(RETRIEVAL, [*models, mean_model(models), *baselines])


def interval(comparison: Comparison, key: str) -> Interval:
    found = comparison.interval(key)
    assert found is not None
    return found


def difference(comparison: Comparison, ours: str, theirs: str) -> Interval:
    found = comparison.difference(ours, theirs)
    assert found is not None
    return found


def test_intervals_hold_their_mean_and_shrink_with_rows() -> None:
    few, many = one(20), one(2000)
    for comparison in (few, many):
        for key, compared in comparison.methods.items():
            found = interval(comparison, key)
            assert found.mean == pytest.approx(compared.metrics["mrr"])
            assert found.low < found.mean < found.high
    widths = [interval(found, "model").high - interval(found, "model").low for found in (few, many)]
    assert widths[1] < widths[0] / 5, "a hundred times the rows: a tenth of the width"


def test_one_model_is_compared_with_every_baseline() -> None:
    comparison = one()
    pairs = pairs_of(comparison)
    assert pairs == [("model", "mean"), ("model", "mlp")]
    expected = paired_difference(scores(50, 1), scores(50, 3))
    found = difference(comparison, "model", "mlp")
    assert found.mean == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)  # other samples
    flat = flat_metrics(comparison, pairs)
    assert flat["difference/model/mlp/mrr"] == pytest.approx(flat["test/mrr"] - flat["baseline/mlp/mrr"])
    assert flat["difference/model/mlp/mrr_low"] == found.low
    assert flat["test/mrr_low"] < flat["test/mrr"] < flat["test/mrr_high"]


def test_several_are_compared_with_the_best_baseline_and_the_first() -> None:
    comparison = several()
    assert best_baseline(comparison) == "mlp"
    assert pairs_of(comparison) == [("a", "mlp"), ("b", "mlp"), ("c", "mlp"), (MEAN, "mlp"), ("b", "a"), ("c", "a")]
    models = [method("a", 9, 1), method("b", 9, 2)]
    bare = Comparison(RETRIEVAL, [*models, mean_model(models)])
    assert best_baseline(bare) is None
    assert pairs_of(bare) == [("b", "a")]


def test_the_lowest_error_is_the_best() -> None:
    errors = {"ridge": 2.0, "mlp": 1.0, "mean": math.nan}
    baselines = [Method(name, name, True, {"mse": value}, None) for name, value in errors.items()]
    comparison = Comparison(REGRESSION, [Method("model", ALONE, False, {"mse": 1.5}, None), *baselines])
    assert best_baseline(comparison) == "mlp"


def test_the_mean_is_over_rows_and_models() -> None:
    comparison = several()
    mean = comparison.methods[MEAN]
    values = [comparison.methods[key].metrics["mrr"] or 0 for key in "abc"]
    assert mean.metrics == pytest.approx({"mrr": sum(values) / 3, "median_rank": 2})
    found = interval(comparison, MEAN)
    alone = mean_interval(torch.cat([scores(50, 1), scores(50, 2, 0.2), scores(50, 3, 0.4)]))
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert found.high - found.low > 1.5 * (interval(comparison, "a").high - interval(comparison, "a").low)


def test_keys_have_the_suffix() -> None:
    comparison = several()
    flat = flat_metrics(comparison, pairs_of(comparison), "_all")
    assert {key.split("/")[0] for key in flat} == {"model_all", "test_all", "baseline_all", "difference_all"}
    for key in (
        "model_all/a/mrr",
        "test_all/mrr_high",
        "baseline_all/mlp/median_rank",
        "difference_all/models/mlp/mrr_low",
    ):
        assert key in flat


def test_methods_without_scores_have_no_intervals() -> None:
    baseline = Method("mlp", "mlp", True, {"mrr": 0.4, "median_rank": 1.0}, None)
    comparison = Comparison(RETRIEVAL, [Method("model", ALONE, False, {"mrr": 0.5}, None), baseline])
    assert comparison.interval("model") is None
    assert comparison.difference("model", "mlp") is None
    assert set(flat_metrics(comparison, pairs_of(comparison))) == {
        "test/mrr",
        "baseline/mlp/mrr",
        "baseline/mlp/median_rank",
    }
    assert interval_table({"MRR": comparison}) is None


NAMES = {
    ("runs/A/checkpoints/best.ckpt", "runs/B/checkpoints/best.ckpt"): ["A", "B"],
    ("runs/A/checkpoints/best.ckpt", "runs/A/checkpoints/last.ckpt"): ["best", "last"],
    ("A/best.ckpt", "B/best.ckpt", "words.safetensors"): ["A-best", "B-best", "words"],
    ("1/x/best.ckpt", "2/x/best.ckpt"): ["1-x", "2-x"],
    ("A/best.ckpt", "A/best.safetensors"): ["best.ckpt", "best.safetensors"],
    ("A/checkpoints/best.ckpt", "A/best.ckpt"): ["checkpoints", "A"],
    ("A/mlp.ckpt", "A/ours.ckpt"): ["A-mlp", "ours"],
    ("a-b/c.ckpt", "x/b/c.ckpt", "b-c.ckpt"): ["a-b-c", "x-b-c", "data-b-c"],
}


@pytest.mark.parametrize("paths", NAMES)
def test_short_names(paths: tuple[str, ...]) -> None:
    assert short_names([Path("/data", path) for path in paths], {"mlp", "model"}) == NAMES[paths]


def shown(comparisons: dict[str, Comparison]) -> str:
    console = Console(file=io.StringIO(), width=100)
    table = interval_table(comparisons)
    assert table is not None
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_intervals_and_differences() -> None:
    comparison = several()
    out = shown({"MRR": comparison, "among 99": comparison})
    assert max(map(len, out.splitlines())) <= 100
    lines = [line for line in out.splitlines() if "mean of 3" in line]
    mean, minus_mlp = interval(comparison, MEAN), difference(comparison, MEAN, "mlp")
    assert f"{mean.low:.3f} to {mean.high:.3f}" in lines[0]
    assert f"{minus_mlp.low:+.3f} to {minus_mlp.high:+.3f}" in lines[1]
    for part in (
        "95% bootstrap intervals over 50 test rows, of the mean also over models",
        "minus mlp, the best",
        "minus a, the first",
    ):
        assert part in out
    assert "flow lattice minus" in shown({"MRR": one()})
