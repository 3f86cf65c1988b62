"""Bootstrap percentile intervals of a mean over test rows, and of the difference of two means.

S runs (seeds) of a method, N test rows, R bootstrap samples
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 2**24  # row weights in memory at a time, over all samples of a block
_PART = 2**18  # row weights times runs in memory at a time: memory must not grow with the number of jobs


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval that holds `LEVEL` of its bootstrap distribution."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Bootstrap means of several methods; a sample holds the same rows for all methods.

    A sample takes N rows with replacement. For each method on its own, it also takes S runs with replacement. S runs
    that are resampled spread less than S new runs would, by the factor sqrt((S - 1) / S). Their distance from the mean
    is therefore divided by this factor (Rao and Wu 1988, Journal of the American Statistical Association 83). A single
    run is not stretched.

    Args:
        methods: scores [S, N] (or [N]) by method: the same N for all, S may differ.
        seed: of the random samples.

    Raises:
        ValueError: the numbers of rows differ, or a method has no scores.
    """

    def __init__(self, methods: Mapping[str, Tensor], *, seed: int = 0) -> None:
        runs = {name: _as_runs(scores) for name, scores in methods.items()}
        lengths = [scores.shape[1] for scores in runs.values()]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{' and '.join(map(str, lengths))} rows: paired methods must be measured on the same test rows"
            )
        self._means = {name: scores.mean() for name, scores in runs.items()}
        self._samples = dict(zip(runs, _sampled_means(list(runs.values()), seed), strict=True))

    def interval(self, name: str) -> Interval:
        """The mean of a method over rows and runs, with its interval."""
        return _interval(self._means[name], self._samples[name])

    def difference(self, ours: str, theirs: str) -> Interval:
        """The mean of `ours` minus the mean of `theirs`, with its interval.

        Rows that are hard for both methods cancel (Efron and Tibshirani 1993, chapter 13).
        """
        return _interval(self._means[ours] - self._means[theirs], self._samples[ours] - self._samples[theirs])


def mean_interval(scores: Tensor, *, seed: int = 0) -> Interval:
    """The mean of scores [S, N] (or [N]) with its interval, as in `Bootstrap.interval`."""
    return Bootstrap({"scores": scores}, seed=seed).interval("scores")


def _as_runs(scores: Tensor) -> Tensor:
    """Scores as float64 [S, N] on the CPU."""
    scores = scores.detach().cpu().double()
    scores = scores.unsqueeze(0) if scores.dim() == 1 else scores
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores {list(scores.shape)}: must be [N > 0] or [S > 0, N > 0]")
    return scores


def _interval(mean: Tensor, samples: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = samples.quantile(torch.tensor([tail, 1 - tail], dtype=samples.dtype)).tolist()
    return Interval(mean.item(), low, high)


def _sampled_means(methods: list[Tensor], seed: int) -> list[Tensor]:
    """Means [R] of every method [S, N]: a sample has the same rows for all methods, and own runs for each."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = methods[0].shape[1]
    means: list[list[Tensor]] = [[] for _ in methods]
    block = max(1, _BLOCK // num_rows)
    for start in range(0, SAMPLES, block):
        num_samples = min(block, SAMPLES - start)
        row_weights = _sampled_weights(num_rows, num_samples, generator)
        for method, found in zip(methods, means, strict=True):
            for part in row_weights.split(max(1, _PART // len(method))):
                run_weights = _stretched(_sampled_weights(len(method), len(part), generator))
                found.append((run_weights * (part @ method.T)).sum(1))
    return [torch.cat(found) for found in means]


def _stretched(weights: Tensor) -> Tensor:
    """Weights [R, S] of runs, moved away from 1 / S as `Bootstrap` says."""
    num = weights.shape[1]
    return weights if num == 1 else 1 / num + (weights - 1 / num) * math.sqrt(num / (num - 1))


def _sampled_weights(num: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """Weights of `num` items in samples of `num` items with replacement, float64 [num_samples, num].

    Every row sums to 1.
    """
    items = torch.randint(num, (num_samples, num), generator=generator)
    counts = torch.zeros(num_samples, num, dtype=torch.float64)
    return counts.scatter_add_(1, items, torch.ones((), dtype=torch.float64).expand(num_samples, num)) / num
