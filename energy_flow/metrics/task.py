"""What a run is measured by: how well predictions find their targets, or how far off they are."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from energy_flow.errors import ConfigError
from energy_flow.metrics.retrieval import ranks, retrieval_metrics

Rows = Callable[[Tensor, Tensor], Tensor]  # prediction, target, both [N, D] -> float64 [N]
Metrics = Callable[[Tensor, Tensor, Tensor], dict[str, float]]  # prediction, target, and what `Rows` gave for them


@dataclass(frozen=True)
class Task:
    """Decides the table of results, the baselines in it, and what "best" means."""

    title: str  # of the table
    headings: Mapping[str, str]  # metric -> heading of its column
    headline: str  # the metric by which methods are compared and their choices made
    summary: tuple[str, ...]  # the metrics that a sweep shows
    lower_is_better: bool
    optimized: tuple[str, ...]  # values of `optimized_metric` that ask for this task
    baselines: tuple[str, ...]
    row_measure: str  # what `rows` finds for each row
    rows: Rows
    primary_of_rows: Callable[[Tensor], Tensor]  # [N] of `rows` -> [N], whose mean is the headline
    metrics: Metrics

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """All metrics of predictions for their targets, both [N, D]."""
        return self.metrics(prediction, target, self.rows(prediction, target))

    def improves(self, new: float, old: float) -> bool:
        """Whether a value of the headline is better than another; any is better than NaN."""
        return math.isnan(old) or (new < old if self.lower_is_better else new > old)

    def shown(self, metric: str, value: float) -> str:
        """A value for people."""
        if metric == "mse":
            return f"{value:#.3g}"
        return f"{value:.1f}" if metric == "median_rank" else f"{value:.3f}"

    def named(self, value: float) -> str:
        """A value of the headline with its name."""
        return f"{self.headings[self.headline]} {self.shown(self.headline, value)}"


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each row, float64 [N].

    Args:
        prediction: [N, D]
        target: [N, D]

    Raises:
        ValueError: the shapes don't fit, or there is no sample.
    """
    if prediction.shape != target.shape or len(prediction) == 0:
        raise ValueError(f"prediction {list(prediction.shape)}, target {list(target.shape)}: must both be [N > 0, D]")
    return (prediction.to(torch.float64) - target.to(torch.float64)).square().mean(-1)


def regression_metrics(prediction: Tensor, target: Tensor, errors: Tensor | None = None) -> dict[str, float]:
    """Mean squared error over all N * D numbers, and the mean cosine; in float64.

    Args:
        prediction: [N, D]
        target: [N, D]
        errors: [N], their `squared_errors` where they are known already.

    Returns:
        mse, cosine

    Raises:
        ValueError: as `squared_errors`.
    """
    errors = squared_errors(prediction, target) if errors is None else errors
    prediction, target = prediction.to(torch.float64), target.to(torch.float64)
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    return {"mse": errors.mean().item(), "cosine": cosine.mean().item()}


RETRIEVAL = Task(
    title="Test: find the target among all targets of the split",
    headings={
        "median_rank": "median rank",
        "recall@1": "R@1",
        "recall@10": "R@10",
        "recall@100": "R@100",
        "mrr": "MRR",
        "cosine": "cosine",
    },
    headline="mrr",
    summary=("mrr", "recall@1", "recall@10"),
    lower_is_better=False,
    optimized=("val/mrr", "val/recall@1", "val/recall@10", "val/recall@100", "val/cosine"),
    baselines=("identity", "mean", "ridge", "procrustes", "linear", "mlp", "residual_mlp", "mlp_cosine"),
    row_measure="rank",
    rows=ranks,
    primary_of_rows=torch.reciprocal,
    metrics=retrieval_metrics,
)

REGRESSION = Task(
    title="Test: errors",
    headings={"mse": "MSE", "cosine": "cosine"},
    headline="mse",
    summary=("mse", "cosine"),
    lower_is_better=True,
    optimized=("val/mse",),
    baselines=("identity", "mean", "ridge", "mlp", "residual_mlp", "mlp_large"),
    row_measure="mse",
    rows=squared_errors,
    primary_of_rows=torch.clone,
    metrics=regression_metrics,
)

TASKS = (RETRIEVAL, REGRESSION)


def task_of(optimized_metric: str) -> Task:
    """The task that a metric belongs to: a run is measured by what picks its best checkpoint.

    Raises:
        ConfigError: no such metric.
    """
    for task in TASKS:
        if optimized_metric in task.optimized:
            return task
    known = ", ".join(metric for task in TASKS for metric in task.optimized)
    raise ConfigError(f"optimized_metric = {optimized_metric!r}: must be one of {known}")


def direction(metric: str) -> str:
    """min or max: where a metric is best. For the configs; of an unknown one `task_of` says so."""
    lower = any(metric in task.optimized and task.lower_is_better for task in TASKS)
    return "min" if lower else "max"
