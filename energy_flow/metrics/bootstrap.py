"""How sure a mean over test rows, or the difference of two, is: bootstrap percentile intervals.

S runs (seeds) of a method, N test rows, R draws
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 10_000
LEVEL = 0.95
_BLOCK = 2**24  # numbers of a block of draws that stand at a time
_PART = 2**18  # of them with runs: so few that memory doesn't grow with the jobs of a sweep


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds `LEVEL` of its bootstrap distribution."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Means of several methods in every draw; all of them see the same rows of a draw.

    A draw takes N rows with replacement, and as many runs as a method has, for each by itself. Of S runs, S drawn with
    replacement spread less than S new ones would, by sqrt((S - 1) / S): their distance from the mean is stretched by as
    much (Rao and Wu 1988, Journal of the American Statistical Association 83). For one run there is nothing to stretch.

    Args:
        methods: [S, N] (or [N]) by name: the same N for all, each its own S.
        seed: of the draws.

    Raises:
        ValueError: the rows aren't as many, or there is nothing to draw from.
    """

    def __init__(self, methods: Mapping[str, Tensor], *, seed: int = 0) -> None:
        runs = {name: _runs(values) for name, values in methods.items()}
        lengths = [values.shape[1] for values in runs.values()]
        if len(set(lengths)) > 1:
            raise ValueError(f"{' and '.join(map(str, lengths))} rows: a pair has the same test rows")
        self._means = {name: values.mean() for name, values in runs.items()}
        self._drawn = dict(zip(runs, _drawn_means(list(runs.values()), seed), strict=True))

    def interval(self, name: str) -> Interval:
        """Of the mean of a method, over rows and over runs."""
        return _interval(self._means[name], self._drawn[name])

    def difference(self, ours: str, theirs: str) -> Interval:
        """Of the mean of one method less that of another: rows that are hard for both cancel (Efron and Tibshirani
        1993, chapter 13).
        """
        return _interval(self._means[ours] - self._means[theirs], self._drawn[ours] - self._drawn[theirs])


def mean_interval(values: Tensor, *, seed: int = 0) -> Interval:
    """Of the mean of `values` [S, N] (or [N]), as `Bootstrap.interval`."""
    return Bootstrap({"values": values}, seed=seed).interval("values")


def _runs(values: Tensor) -> Tensor:
    """float64 [S, N] on the CPU."""
    values = values.detach().cpu().double()
    values = values.unsqueeze(0) if values.dim() == 1 else values
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"values {list(values.shape)} must be [N] or [runs, N], neither of them 0")
    return values


def _interval(mean: Tensor, drawn: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return Interval(mean.item(), low, high)


def _drawn_means(methods: list[Tensor], seed: int) -> list[Tensor]:
    """Means [R] of every method [S, N]: all methods see the same rows of a draw, each draws its own runs."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = methods[0].shape[1]
    means: list[list[Tensor]] = [[] for _ in methods]
    block = max(1, _BLOCK // num_rows)
    for start in range(0, DRAWS, block):
        num_draws = min(block, DRAWS - start)
        rows = _drawn_shares(num_rows, num_draws, generator)
        for method, found in zip(methods, means, strict=True):
            for part in rows.split(max(1, _PART // len(method))):
                runs = _stretched(_drawn_shares(len(method), len(part), generator))
                found.append((runs * (part @ method.T)).sum(1))
    return [torch.cat(found) for found in means]


def _stretched(shares: Tensor) -> Tensor:
    """Shares [R, S] of drawn runs, further from equal ones: see `Bootstrap`."""
    num = shares.shape[1]
    return shares if num == 1 else 1 / num + (shares - 1 / num) * math.sqrt(num / (num - 1))


def _drawn_shares(num: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """How large a share each of `num` things has in a draw of `num` with replacement, float64 [num_draws, num]."""
    drawn = torch.randint(num, (num_draws, num), generator=generator)
    counts = torch.zeros(num_draws, num, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(num_draws, num)) / num
