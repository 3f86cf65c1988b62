"""Simple methods on the same data, to judge the results of a flow lattice.

- `identity`: the source embedding.
- `mean`: the mean target of `train` for every sample. This is the floor: all samples order the candidates equally, so
  their ranks are 1 to N.
- `ridge`: the linear map (XᵀX + λ)⁻¹XᵀY, λ selected on `val`. Regression adds an intercept (X and Y are centred).
  Retrieval does not: a shift that all predictions share carries no information.
- `procrustes`: the orthogonal map UVᵀ with UΣVᵀ = XᵀY (Schönemann 1966, Psychometrika 31).
- `linear`: a linear map with bias, initialised as the identity, trained with the model's loss except the terms that
  need a flow lattice: its surface term and those of `loss.terms`. Here and below, learning rate, weight decay and epoch
  are selected on `val`.
- `mlp`: Linear(D, h), GELU, Linear(h, D) with as many parameters as the model, same loss.
- `residual_mlp`: the same MLP plus a skip connection.
- `mlp_cosine`: the same MLP with the cosine loss, and four times as many epochs.
- `mlp_large`: the same MLP with `baselines.large` times as many parameters.

N samples, D embedding dimension, h hidden size of an MLP
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from energy_flow.comparison.trained_baselines import (
    Build,
    Pairs,
    Report,
    TrainedBaseline,
    TrainingSettings,
    linear,
    mlp,
    residual_mlp,
)
from energy_flow.metrics.retrieval import AllTargets
from energy_flow.metrics.task import RETRIEVAL, Task
from energy_flow.settings import Settings
from energy_flow.training.losses import SHIPPED, LossSettings

Predict = Callable[[Tensor], Tensor]  # source [N, D] -> prediction [N, D]
Fit = Callable[[dict[str, Pairs]], tuple[Predict, str]]  # splits -> prediction function, selected hyperparameters

NEEDS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "mean": ("train",),
    "ridge": ("train", "val"),
    "procrustes": ("train",),
    **dict.fromkeys(("linear", "mlp", "residual_mlp", "mlp_cosine", "mlp_large"), ("train", "val")),
}
WITH_LOSS = ("linear", "mlp", "residual_mlp", "mlp_large")  # trained with the model's loss
USED_FOR = {"train": "data.train to fit", "val": "data.val to select {choice} by {metric}"}
CHOICE = {"ridge": "λ"}  # the others select the best epoch

# λ of ridge regression, relative to the mean eigenvalue of XᵀX: one grid works for any number of samples.
RIDGE_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 7))
GRAM_ROWS = 65536
COSINE_EPOCHS = 4  # times as many epochs with the cosine loss, which learns more slowly (MRR .29 after 6, .37 after 20)


class BaselineSettings(Settings):
    """Config group `baselines`."""

    enabled: bool
    training: TrainingSettings
    large: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class BaselineResults:
    """Results by the name of the baseline."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # of those that ran
    # Scores on every test row, float64 [N]; also among the targets of all splits. `==` on tensors gives a tensor.
    row_scores: dict[str, Tensor] = field(default_factory=dict, compare=False)
    all_row_scores: dict[str, Tensor] = field(default_factory=dict, compare=False)
    skipped: dict[str, str] = field(default_factory=dict)  # reasons
    details: dict[str, str] = field(default_factory=dict)  # selected hyperparameters


def run_baselines(
    train: Pairs | None,
    val: Pairs | None,
    test: Pairs,
    *,
    task: Task,
    settings: BaselineSettings,
    num_parameters: int,
    loss: LossSettings,
    seed: int,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    all_targets: AllTargets | None = None,
) -> BaselineResults:
    """Fit the task's baselines on `train`, select on `val` by the primary metric, measure on `test`.

    The function neither reads nor changes the global random state. On one device, equal arguments give equal results.

    Args:
        train, val, test: (source [N, D], target [N, D]) float32. `skipped` lists the baselines that need a missing
            `train` or `val`.
        task: names the baselines and measures them.
        settings: for the trained baselines; `enabled` is ignored here.
        num_parameters, loss: of the model.
        seed: for initial weights and sample order.
        report: called with the current step, such as "mlp epoch 3/20".
        all_targets: a larger gallery, in which test rows are ranked too.

    Raises:
        ValueError: the shapes of source and target, or of two splits, don't match.
    """
    given = {"train": train, "val": val, "test": test}
    splits = {name: (pairs[0].to(device), pairs[1].to(device)) for name, pairs in given.items() if pairs is not None}
    _check_shapes(splits)
    report = report or (lambda _: None)
    fits = _fits(task, settings, num_parameters, loss, seed, report)
    results = BaselineResults()
    for name in task.baselines:
        words = {"choice": CHOICE.get(name, "the best epoch"), "metric": task.primary_heading}
        missing = [USED_FOR[split].format(**words) for split in NEEDS[name] if split not in splits]
        if missing:
            results.skipped[name] = "needs " + " and ".join(missing)
            continue
        if name in WITH_LOSS and not _has_embedding_term(loss):
            results.skipped[name] = f"only {_listed_terms(loss)} would train it, with the output of a flow lattice"
            continue
        report(name)
        _measure(name, fits[name], splits, task, results, all_targets)
        if name in WITH_LOSS and any(loss.term_weights().values()):
            results.details[name] += f"; trained without {_listed_terms(loss)}"
    return results


def _has_embedding_term(loss: LossSettings) -> bool:
    return loss.cosine > 0 or loss.mse > 0 or loss.contrastive > 0


def _listed_terms(loss: LossSettings) -> str:
    """The terms of one's own with a weight > 0, by their keys."""
    return ", ".join(f"loss.terms.{name}" for name, weight in loss.term_weights().items() if weight > 0)


def _fits(
    task: Task, settings: BaselineSettings, num_parameters: int, loss: LossSettings, seed: int, report: Report
) -> dict[str, Fit]:
    """All baselines by name."""
    only_cosine = {**dict.fromkeys(SHIPPED, 0.0), "cosine": 1.0, "learn_temperature": False}
    cosine = loss.model_copy(update=only_cosine)
    longer = settings.training.model_copy(update={"epochs": COSINE_EPOCHS * settings.training.epochs})

    def trained(
        name: str, build: Build, own_loss: LossSettings = loss, training: TrainingSettings = settings.training
    ) -> Fit:
        baseline = TrainedBaseline(name, build, task, own_loss, training, seed, report)

        def fit(splits: dict[str, Pairs]) -> tuple[Predict, str]:
            fitted = baseline.fit(splits["train"], splits["val"])
            return fitted.network, fitted.detail

        return fit

    return {
        "identity": _fit_identity,
        "mean": _fit_mean,
        "ridge": lambda splits: _fit_ridge(splits, task),
        "procrustes": _fit_procrustes,
        "linear": trained("linear", linear),
        "mlp": trained("mlp", mlp(num_parameters)),
        "residual_mlp": trained("residual_mlp", residual_mlp(num_parameters)),
        "mlp_cosine": trained("mlp_cosine", mlp(num_parameters), cosine, longer),
        "mlp_large": trained("mlp_large", mlp(settings.large * num_parameters)),
    }


def _measure(
    name: str, fit: Fit, splits: dict[str, Pairs], task: Task, results: BaselineResults, all_targets: AllTargets | None
) -> None:
    # The caller may be in Lightning's inference mode, where an MLP can't be trained.
    with torch.inference_mode(False), torch.enable_grad():
        predict, detail = fit(splits)
    source, target = splits["test"]
    with torch.no_grad():
        prediction = predict(source)
        results.row_scores[name] = task.row_scores(prediction, target).cpu()
        results.metrics[name] = task.metrics(prediction, target, results.row_scores[name])
        if all_targets is not None:
            results.all_row_scores[name] = all_targets.ranks(prediction).cpu()
    if detail:
        results.details[name] = detail


def _fit_identity(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    return lambda source: source, ""


def _fit_mean(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    mean = splits["train"][1].double().mean(0)
    return lambda source: mean.expand(len(source), -1), ""


def _fit_ridge(splits: dict[str, Pairs], task: Task) -> tuple[Predict, str]:
    (source, target), (val_source, val_target) = splits["train"], splits["val"]
    mean_source, mean_target = source.double().mean(0), target.double().mean(0)
    if task is RETRIEVAL:
        mean_source, mean_target = torch.zeros_like(mean_source), torch.zeros_like(mean_target)
    # One eigendecomposition XᵀX = Q diag(e) Qᵀ is enough for all λ: (XᵀX + λ)⁻¹XᵀY = Q diag(1 / (e + λ)) QᵀXᵀY.
    eigenvalues, vectors = torch.linalg.eigh(_gram(source, source) - len(source) * mean_source.outer(mean_source))
    projected = vectors.T @ (_gram(source, target) - len(source) * mean_source.outer(mean_target))
    scale = eigenvalues.mean().clamp(min=torch.finfo(torch.float32).tiny)

    def linear_map(grid_value: float) -> Predict:
        matrix = vectors @ (projected / (eigenvalues.clamp(min=0) + grid_value * scale).unsqueeze(-1))
        return lambda x: (x.double() - mean_source) @ matrix + mean_target

    found = [task.measure(linear_map(g)(val_source), val_target)[task.primary] for g in RIDGE_GRID]
    best = task.best(found)
    low, high, value = (g * scale.item() for g in (RIDGE_GRID[0], RIDGE_GRID[-1], RIDGE_GRID[best]))
    detail = f"λ = {value:.3g} of {len(RIDGE_GRID)} from {low:.3g} to {high:.3g} (val {task.named(found[best])})"
    return linear_map(RIDGE_GRID[best]), detail


def _fit_procrustes(splits: dict[str, Pairs]) -> tuple[Predict, str]:
    u, _, vt = torch.linalg.svd(_gram(*splits["train"]))
    rotation = u @ vt
    return lambda source: source.double() @ rotation, ""


def _gram(x: Tensor, y: Tensor) -> Tensor:
    # In chunks: a large data set must not be in memory as float64.
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for rows_x, rows_y in zip(x.split(GRAM_ROWS), y.split(GRAM_ROWS), strict=True):
        total += rows_x.double().T @ rows_y.double()
    return total


def _check_shapes(splits: dict[str, Pairs]) -> None:
    dim = splits["test"][0].shape[1:]
    for name, (source, target) in splits.items():
        if source.shape != target.shape or source.shape[1:] != dim or source.dim() != 2 or len(source) < 2:
            raise ValueError(
                f"{name}: source {list(source.shape)} and target {list(target.shape)} must both be [N >= 2, D], "
                f"with the D = {list(dim)} of the test split"
            )
