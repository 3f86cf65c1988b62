"""Bootstrap intervals: against known spreads, pairing, runs, coverage."""

import math

import pytest
import torch
from torch import Tensor

from energy_flow.metrics import bootstrap
from energy_flow.metrics.bootstrap import Bootstrap, Interval, mean_interval
from tests.comparison.sweeps import paired_difference


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = numbers(500, seed=1) * 3 + 2
    found = mean_interval(values)
    error = values.std(correction=0).item() / math.sqrt(500)
    assert found.mean == pytest.approx(values.mean().item())
    # 10,000 draws: a 2.5% quantile is known to about 2% of its distance; the distribution is nearly normal.
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)


def test_few_rows_by_all_draws_there_are() -> None:
    """Three rows: 27 equally likely draws, whose quantiles are known."""
    values = torch.tensor([0.0, 1.0, 3.0])
    draws = torch.cartesian_prod(*[values] * 3).mean(1).sort().values
    found = mean_interval(values)
    assert found == Interval(pytest.approx(4 / 3), draws[0].item(), draws[-1].item())  # 1/27 > 2.5% at both ends


def test_rows_that_are_hard_for_both_cancel() -> None:
    hard, gain = numbers(400, seed=2) * 10, numbers(400, seed=3) * 0.1 + 0.05
    found = paired_difference(hard + gain, hard)
    assert found.mean == pytest.approx(gain.mean().item())
    error = gain.std(correction=0).item() / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.low > 0


def test_runs_that_differ_widen_the_interval() -> None:
    rows = numbers(300, seed=4)
    alike = torch.stack([rows, rows, rows])
    differing = alike + torch.tensor([[-1.0], [0.0], [1.0]])
    narrow, wide = mean_interval(alike), mean_interval(differing)
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert paired_difference(differing, rows).low < -0.5, "runs are drawn for each method by itself"


def test_few_runs_spread_as_new_ones_would() -> None:
    """Two runs, one row: drawn means have the variance that the mean of two new runs has, var / 2 of its estimate."""
    found = mean_interval(torch.tensor([[0.0], [1.0]]))
    assert found == Interval(0.5, pytest.approx(0.5 - math.sqrt(0.5)), pytest.approx(0.5 + math.sqrt(0.5)))


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 500)
    covered = 0
    for seed in range(200):
        found = paired_difference(numbers(60, seed=1000 + seed) + 0.5, numbers(60, seed=5000 + seed))
        covered += found.low <= 0.5 <= found.high
    assert 178 <= covered <= 199  # of 200 at 95%: 190, standard deviation 3; percentile intervals are a bit narrow


def test_blocks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers(2, 50, seed=6)
    whole = mean_interval(values)
    assert mean_interval(values) == whole
    assert mean_interval(values, seed=1) != whole
    monkeypatch.setattr(bootstrap, "_BLOCK", 50 * 999)
    parts = mean_interval(values)
    assert parts.mean == whole.mean
    assert parts.low == pytest.approx(whole.low, abs=0.02)


def test_what_is_no_pair() -> None:
    with pytest.raises(ValueError, match="4 and 5 rows: a pair has the same test rows"):
        paired_difference(torch.ones(2, 4), torch.ones(5))
    for empty in (torch.ones(0), torch.ones(2, 0), torch.ones(1, 1, 1)):
        with pytest.raises(ValueError, match=r"must be \[N\] or \[runs, N\]"):
            mean_interval(empty)


def test_methods_of_one_set_of_draws_see_the_same_rows() -> None:
    hard, gain = numbers(400, seed=2) * 10, numbers(400, seed=3) * 0.1 + 0.05
    draws = Bootstrap({"ours": hard + gain, "theirs": hard, "third": torch.stack([hard, hard])})
    assert draws.difference("ours", "theirs") == paired_difference(hard + gain, hard)
    assert draws.difference("third", "theirs") == Interval(0.0, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert draws.interval("theirs").high - draws.interval("theirs").low > 1
