"""Compare tested models with baselines, and with each other.

`Comparison.methods` has the models, then their mean if there are several, then the baselines.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from energy_flow.comparison.compare import Comparison, Method, bounds
from energy_flow.metrics.row_scores import MODEL  # also the key of a single model

MEAN = "models"  # key of the mean of several models; `mean` is a baseline
Pair = tuple[str, str]  # keys of two methods: the first minus the second


def mean_metrics(models: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of every metric that all models have."""
    means = {}
    for name in models[0]:
        values = [value for metrics in models if (value := metrics.get(name)) is not None]
        if len(values) == len(models):
            means[name] = sum(values) / len(values)
    return means


def mean_model(models: Sequence[Method]) -> Method:
    """The mean of several models; each of them is one of its runs."""
    scores = [model.scores for model in models if model.scores is not None]
    metrics = mean_metrics([model.metrics for model in models])
    together = torch.cat(scores) if len(scores) == len(models) else None
    return Method(MEAN, f"mean of {len(models)}", False, metrics, together)


def has_several(comparison: Comparison) -> bool:
    """Whether the comparison has more than one model."""
    return MEAN in comparison.methods


def pairs_of(comparison: Comparison) -> list[Pair]:
    """The pairs to compare.

    A single model is compared with every baseline. Several models, and their mean, are compared with the best
    baseline; all models but the first are also compared with the first.
    """
    models, baselines = ([method.key for method in group] for group in (comparison.models, comparison.baselines))
    if not has_several(comparison):
        return [(ours, theirs) for ours in models for theirs in baselines]
    best = best_baseline(comparison)
    first, *others = (key for key in models if key != MEAN)
    return [*((ours, best) for ours in models if best is not None), *((ours, first) for ours in others)]


def best_baseline(comparison: Comparison) -> str | None:
    """The baseline with the best primary metric; None without baselines."""
    values = [method.metrics[comparison.task.primary] for method in comparison.baselines]
    known = [math.nan if value is None else value for value in values]
    return comparison.baselines[comparison.task.best(known)].key if known else None


def flat_metrics(comparison: Comparison, pairs: Sequence[Pair], suffix: str = "") -> dict[str, float]:
    """Metrics, intervals and differences by their keys in `metrics.json`: `test/mrr`, `test/mrr_low`, ...

    Args:
        comparison: the tested models and their baselines.
        pairs: differences to include.
        suffix: ends the first part of every key, to distinguish several comparisons: `test_all/mrr`.
    """
    flat: dict[str, float] = {}
    primary = comparison.task.primary
    for method in comparison.methods.values():
        section = _section(method, suffix)
        flat |= {f"{section}/{name}": value for name, value in method.metrics.items() if value is not None}
        flat |= bounds(f"{section}/{primary}", comparison.interval(method.key))
    for ours, theirs in pairs:
        difference = comparison.difference(ours, theirs)
        if difference is not None:
            name = f"difference{suffix}/{ours}/{theirs}/{primary}"
            flat |= {name: difference.mean, **bounds(name, difference)}
    return flat


def _section(method: Method, suffix: str) -> str:
    if method.key in (MODEL, MEAN):
        return f"test{suffix}"
    return f"{'baseline' if method.is_baseline else 'model'}{suffix}/{method.key}"


def short_names(paths: Sequence[Path], taken: set[str]) -> list[str]:
    """Shortest path suffixes that distinguish the files.

    `checkpoints` folders and file suffixes are left out where possible, and a file name that all files share.

    Args:
        paths: different absolute paths. A file whose folders don't distinguish it gets its number as its name.
        taken: names that are already in use.
    """
    full = [(*path.parent.parts, path.name) for path in paths]
    short = [(*(part for part in path.parent.parts if part != "checkpoints"), path.stem) for path in paths]
    parts = short if len(set(short)) == len(paths) else full
    if len(parts) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    endings = [["-".join(own[-length:]) for length in range(1, len(own))] for own in parts]
    counts = Counter(name for names in endings for name in names)
    return [
        next((name for name in names if counts[name] == 1 and name not in taken), str(number))
        for number, names in enumerate(endings, 1)
    ]
