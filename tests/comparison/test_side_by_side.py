"""Models beside baselines: means, intervals, which pairs are compared, keys, names of files, the table."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from energy_flow.comparison.side_by_side import MEAN, Method, SideBySide, short_names, show_how_sure
from energy_flow.metrics.bootstrap import mean_interval
from energy_flow.metrics.task import REGRESSION, RETRIEVAL
from tests.comparison.sweeps import paired_difference


def shares(num_rows: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, num_rows, generator=generator, dtype=torch.float64) + shift


def method(num_rows: int, seed: int, shift: float = 0.0) -> Method:
    values = shares(num_rows, seed, shift)
    return Method({"mrr": values.mean().item(), "median_rank": float(seed)}, values)


def one(num_rows: int = 50) -> SideBySide:
    return SideBySide(
        RETRIEVAL, {"model": method(num_rows, 1)}, {"mean": method(num_rows, 2), "mlp": method(num_rows, 3)}
    )


def several() -> SideBySide:
    models = {"a": method(50, 1), "b": method(50, 2, 0.2), "c": method(50, 3, 0.4)}
    return SideBySide(RETRIEVAL, models, {"mean": method(50, 4, -0.3), "mlp": method(50, 5, 0.1)}, "_all")


def test_intervals_hold_their_mean_and_shrink_with_rows() -> None:
    few, many = one(20), one(2000)
    for comparison in (few, many):
        for key, found in comparison.intervals.items():
            assert found.mean == pytest.approx(comparison.methods[key].metrics["mrr"])
            assert found.low < found.mean < found.high
    widths = [found.intervals["model"].high - found.intervals["model"].low for found in (few, many)]
    assert widths[1] < widths[0] / 5, "a hundred times the rows: a tenth of the width"


def test_one_model_is_compared_with_every_baseline() -> None:
    comparison = one()
    pairs = comparison.pairs()
    assert pairs == [("model", "mean"), ("model", "mlp")]
    expected = paired_difference(comparison.methods["model"].shares, comparison.methods["mlp"].shares)
    found = comparison.differences(pairs)["model", "mlp"]
    assert found.mean == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)  # other draws
    flat = comparison.flat(pairs)
    assert flat["difference/model/mlp/mrr"] == pytest.approx(flat["test/mrr"] - flat["baseline/mlp/mrr"])
    assert flat["difference/model/mlp/mrr_low"] == found.low
    assert flat["test/mrr_low"] < flat["test/mrr"] < flat["test/mrr_high"]


def test_several_are_compared_with_the_best_baseline_and_the_first() -> None:
    comparison = several()
    assert comparison.best_baseline == "mlp"
    assert comparison.pairs() == [("a", "mlp"), ("b", "mlp"), ("c", "mlp"), (MEAN, "mlp"), ("b", "a"), ("c", "a")]
    bare = SideBySide(RETRIEVAL, {"a": method(9, 1), "b": method(9, 2)}, {})
    assert bare.best_baseline is None
    assert bare.pairs() == [("b", "a")]


def test_the_lowest_error_is_the_best() -> None:
    beside = {name: Method({"mse": value}, None) for name, value in (("ridge", 2.0), ("mlp", 1.0), ("mean", math.nan))}
    assert SideBySide(REGRESSION, {"model": Method({"mse": 1.5}, None)}, beside).best_baseline == "mlp"


def test_the_mean_is_over_rows_and_models() -> None:
    comparison = several()
    mean = comparison.methods[MEAN]
    assert mean.metrics == pytest.approx(
        {"mrr": sum(comparison.methods[k].metrics["mrr"] for k in "abc") / 3, "median_rank": 2}
    )
    found, alone = (
        comparison.intervals[MEAN],
        mean_interval(torch.cat([shares(50, 1), shares(50, 2, 0.2), shares(50, 3, 0.4)])),
    )
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert found.high - found.low > 1.5 * (comparison.intervals["a"].high - comparison.intervals["a"].low)


def test_keys_say_which_candidates() -> None:
    comparison = several()
    flat = comparison.flat(comparison.pairs())
    assert {key.split("/")[0] for key in flat} == {"model_all", "test_all", "baseline_all", "difference_all"}
    for key in (
        "model_all/a/mrr",
        "test_all/mrr_high",
        "baseline_all/mlp/median_rank",
        "difference_all/models/mlp/mrr_low",
    ):
        assert key in flat


def test_limited_rows_have_no_intervals() -> None:
    comparison = SideBySide(RETRIEVAL, {"model": Method({"mrr": 0.5}, None)}, {"mlp": method(50, 1)})
    assert comparison.intervals == {}
    assert set(comparison.flat(comparison.pairs())) == {"test/mrr", "baseline/mlp/mrr", "baseline/mlp/median_rank"}


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


def shown(comparisons: dict[str, SideBySide]) -> str:
    console = Console(file=io.StringIO(), width=100)
    show_how_sure(comparisons, {"model": "flow lattice", MEAN: "mean of 3"}, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_intervals_and_differences() -> None:
    comparison = several()
    out = shown({"MRR": comparison, "among 99": comparison})
    assert max(map(len, out.splitlines())) <= 100
    lines = [line for line in out.splitlines() if "mean of 3" in line]
    low, high = comparison.intervals[MEAN].low, comparison.intervals[MEAN].high
    assert f"{low:.3f} to {high:.3f}" in lines[0]
    difference = comparison.differences([(MEAN, "mlp")])[MEAN, "mlp"]
    assert f"{difference.low:+.3f} to {difference.high:+.3f}" in lines[1]
    for part in (
        "95% bootstrap intervals over 50 test rows, of the mean also over models",
        "minus mlp, the best",
        "minus a, the first",
    ):
        assert part in out
    assert "flow lattice minus" in shown({"MRR": one()})
