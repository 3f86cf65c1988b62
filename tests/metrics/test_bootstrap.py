"""Bootstrap intervals: known standard errors, pairing, several runs, coverage."""

import math

import pytest
import torch
from torch import Tensor

from energy_flow.metrics import bootstrap
from energy_flow.metrics.bootstrap import Bootstrap, Interval, mean_interval
from tests.comparison.sweeps import paired_difference


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_agrees_with_its_standard_error() -> None:
    values = numbers(500, seed=1) * 3 + 2
    found = mean_interval(values)
    error = values.std(correction=0).item() / math.sqrt(500)
    assert found.mean == pytest.approx(values.mean().item())
    # The distribution is nearly normal. With 10,000 samples the error of a 2.5% quantile is about 2% of its distance to
    # the mean.
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)


def test_three_rows_have_exact_quantiles() -> None:
    """Three rows have 27 equally likely samples, so the quantiles are known."""
    values = torch.tensor([0.0, 1.0, 3.0])
    samples = torch.cartesian_prod(*[values] * 3).mean(1).sort().values
    found = mean_interval(values)
    assert found == Interval(pytest.approx(4 / 3), samples[0].item(), samples[-1].item())  # 1/27 > 2.5% at both ends


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
    assert paired_difference(differing, rows).low < -0.5, "runs are sampled for each method on its own"


def test_two_runs_spread_like_two_new_runs() -> None:
    """With two runs and one row, bootstrap means have variance var / 2, like the mean of two new runs."""
    found = mean_interval(torch.tensor([[0.0], [1.0]]))
    assert found == Interval(0.5, pytest.approx(0.5 - math.sqrt(0.5)), pytest.approx(0.5 + math.sqrt(0.5)))


def test_the_interval_covers_the_truth_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "SAMPLES", 500)
    covered = 0
    for seed in range(200):
        found = paired_difference(numbers(60, seed=1000 + seed) + 0.5, numbers(60, seed=5000 + seed))
        covered += found.low <= 0.5 <= found.high
    assert 178 <= covered <= 199  # of 200 at 95%: 190, standard deviation 3; percentile intervals are a bit narrow


def test_blocks_change_only_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers(2, 50, seed=6)
    whole = mean_interval(values)
    assert mean_interval(values) == whole
    assert mean_interval(values, seed=1) != whole
    monkeypatch.setattr(bootstrap, "_BLOCK", 50 * 999)
    parts = mean_interval(values)
    assert parts.mean == whole.mean
    assert parts.low == pytest.approx(whole.low, abs=0.02)


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="4 and 5 rows: paired methods must be measured on the same test rows"):
        paired_difference(torch.ones(2, 4), torch.ones(5))
    for empty in (torch.ones(0), torch.ones(2, 0), torch.ones(1, 1, 1)):
        with pytest.raises(ValueError, match=r"must be \[N > 0\] or \[S > 0, N > 0\]"):
            mean_interval(empty)


def test_all_methods_see_the_same_rows() -> None:
    hard, gain = numbers(400, seed=2) * 10, numbers(400, seed=3) * 0.1 + 0.05
    samples = Bootstrap({"ours": hard + gain, "theirs": hard, "third": torch.stack([hard, hard])})
    assert samples.difference("ours", "theirs") == paired_difference(hard + gain, hard)
    assert samples.difference("third", "theirs") == Interval(
        0.0, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9)
    )
    assert samples.interval("theirs").high - samples.interval("theirs").low > 1
