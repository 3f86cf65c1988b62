"""Tasks: retrieval, which counts ranks, and regression, which counts errors.

N samples, D embedding dimension
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from energy_flow.errors import ConfigError
from energy_flow.metrics.retrieval import ranks, retrieval_metrics


@dataclass(frozen=True)
class Task:
    """How a run is measured: its table of results, its baselines, and the meaning of "best".

    Attributes:
        title: of the table of results.
        headings: headings of its columns by metric.
        primary: the primary metric; it compares methods and selects λ, epochs and checkpoints.
        summary: the metrics that a sweep shows.
        lower_is_better: whether a lower primary metric is better.
        optimized: values of the config key `optimized_metric` that select this task.
        baselines: names of the baselines, in the order of the table.
        row_measure: name of the row scores.
        row_scores: computes one score per sample, float64 [N], from prediction and target [N, D].
        primary_scores: turns row scores into numbers [..., N] whose mean is the primary metric.
        metrics: computes all metrics of a method from prediction, target and row scores.
    """

    title: str
    headings: Mapping[str, str]
    primary: str
    summary: tuple[str, ...]
    lower_is_better: bool
    optimized: tuple[str, ...]
    baselines: tuple[str, ...]
    row_measure: str
    row_scores: Callable[[Tensor, Tensor], Tensor]
    primary_scores: Callable[[Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor, Tensor], dict[str, float]]

    @property
    def primary_heading(self) -> str:
        """The heading of the primary metric."""
        return self.headings[self.primary]

    @property
    def secondary(self) -> tuple[str, ...]:
        """The summary metrics other than the primary one."""
        return tuple(metric for metric in self.summary if metric != self.primary)

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """All metrics of predictions for their targets, both [N, D]."""
        return self.metrics(prediction, target, self.row_scores(prediction, target))

    def improves(self, new: float, old: float) -> bool:
        """Whether `new` is a better value of the primary metric than `old`; any value is better than NaN."""
        return math.isnan(old) or (new < old if self.lower_is_better else new > old)

    def best(self, values: Sequence[float]) -> int:
        """The index of the best value of the primary metric, the first of equal ones; 0 if there are no values."""
        best = 0
        for index, value in enumerate(values):
            best = index if self.improves(value, values[best]) else best
        return best

    def shown(self, metric: str, value: float) -> str:
        """Format a value for the screen."""
        if metric == "mse":
            return f"{value:#.3g}"
        return f"{value:.1f}" if metric == "median_rank" else f"{value:.3f}"

    def named(self, value: float) -> str:
        """Format a value of the primary metric with its name: "MRR 0.512"."""
        return f"{self.primary_heading} {self.shown(self.primary, value)}"


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each row, float64 [N].

    Args:
        prediction: [N, D]
        target: [N, D]

    Raises:
        ValueError: the shapes differ, or N = 0.
    """
    if prediction.shape != target.shape or len(prediction) == 0:
        raise ValueError(f"prediction {list(prediction.shape)}, target {list(target.shape)}: must both be [N > 0, D]")
    return (prediction.double() - target.double()).square().mean(-1)


def regression_metrics(prediction: Tensor, target: Tensor, errors: Tensor | None = None) -> dict[str, float]:
    """Mean squared error over all N * D numbers, and mean cosine, computed in float64.

    Args:
        prediction: [N, D]
        target: [N, D]
        errors: their `squared_errors` [N], if already computed.

    Returns:
        mse, cosine

    Raises:
        ValueError: see `squared_errors`.
    """
    errors = squared_errors(prediction, target) if errors is None else errors
    cosine = F.cosine_similarity(prediction.double(), target.double(), dim=-1)
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
    primary="mrr",
    summary=("mrr", "recall@1", "recall@10"),
    lower_is_better=False,
    optimized=("val/mrr", "val/recall@1", "val/recall@10", "val/recall@100", "val/cosine"),
    baselines=("identity", "mean", "ridge", "procrustes", "linear", "mlp", "residual_mlp", "mlp_cosine"),
    row_measure="rank",
    row_scores=ranks,
    primary_scores=torch.reciprocal,
    metrics=retrieval_metrics,
)

REGRESSION = Task(
    title="Test: errors",
    headings={"mse": "MSE", "cosine": "cosine"},
    primary="mse",
    summary=("mse", "cosine"),
    lower_is_better=True,
    optimized=("val/mse",),
    baselines=("identity", "mean", "ridge", "mlp", "residual_mlp", "mlp_large"),
    row_measure="mse",
    row_scores=squared_errors,
    primary_scores=torch.clone,
    metrics=regression_metrics,
)

TASKS = (RETRIEVAL, REGRESSION)


def task_of(optimized_metric: str) -> Task:
    """The task of a value of `optimized_metric`, the metric that selects the best checkpoint.

    Raises:
        ConfigError: the metric is unknown.
    """
    for task in TASKS:
        if optimized_metric in task.optimized:
            return task
    known = ", ".join(metric for task in TASKS for metric in task.optimized)
    raise ConfigError(f"optimized_metric = {optimized_metric!r}: must be one of {known}")


def is_known(metric: str) -> bool:
    """Whether a metric selects a task."""
    return any(metric in task.optimized for task in TASKS)


def direction(metric: str, mode: str | None = None) -> str:
    """`min` or `max`: the direction in which a metric improves, or `mode` if it isn't None.

    The configs call it, so it accepts unknown metrics; `task_of` refuses them later with a clear message.
    """
    if mode is not None:
        return mode
    lower = any(metric in task.optimized and task.lower_is_better for task in TASKS)
    return "min" if lower else "max"
