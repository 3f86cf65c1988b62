"""Test a model, fit the baselines, write and show the results of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import Tensor

from energy_flow.atomic import atomic_write
from energy_flow.comparison.baselines import BaselineResults, BaselineSettings, run_baselines
from energy_flow.comparison.compare import ALONE
from energy_flow.comparison.trained_baselines import Pairs
from energy_flow.data import EnergyDataModule
from energy_flow.data.samples import Samples
from energy_flow.metrics.retrieval import AllTargets
from energy_flow.metrics.row_scores import FILE, read_row_scores, write_row_scores
from energy_flow.metrics.task import RETRIEVAL, Task, task_of
from energy_flow.runs.screen import show_examples, show_metrics, show_notes
from energy_flow.runs.settings import TrainSettings
from energy_flow.runs.training import ended_by_signals
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule


@dataclass(frozen=True)
class Results:
    """Results of a run: metrics of the model, and results of the baselines."""

    task: Task
    metrics: dict[str, float]  # flat: test/mrr, params, fit_seconds, ...
    baselines: BaselineResults

    def summary(self) -> dict[str, float]:
        """The most important metrics of the model, for the comparison of runs."""
        tested = [f"test/{metric}" for metric in self.task.headings]
        names = [*tested, *self.task.optimized, "params", "fit_seconds"]
        return {name: self.metrics[name] for name in names if name in self.metrics}

    def flat(self) -> dict[str, float]:
        """All metrics by their keys in `metrics.json`."""
        baselines = {f"baseline/{b}/{m}": v for b, row in self.baselines.metrics.items() for m, v in row.items()}
        return {**self.metrics, **baselines}


def hyper_parameters(settings: TrainSettings) -> dict[str, Any]:
    """The settings that influence the trained weights, flat, for TensorBoard's page of hyperparameters."""
    flat: dict[str, Any] = {"seed": settings.seed}
    for section in ("lattice", "model", "loss", "optimizer"):
        flat |= _flatten(section, getattr(settings, section))
    for section, names in (("data", ("name", "batch_size")), ("trainer", ("max_epochs", "precision"))):
        flat |= _flatten(section, {name: getattr(settings, section)[name] for name in names})
    return flat


def _flatten(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flatten(f"{key}.{name}", item).items()}
    return {key: value if isinstance(value, int | float | str) else str(value)}


def fit_baselines(
    settings: BaselineSettings,
    data: EnergyDataModule,
    task: Task,
    *,
    num_parameters: int,
    loss: LossSettings,
    seed: int,
    device: torch.device,
    console: Console,
    all_targets: AllTargets | None = None,
) -> BaselineResults:
    """Fit and test the baselines on the run's data, see `run_baselines`.

    Returns:
        No results if the baselines are disabled, or if there is no test split.
    """
    if not settings.enabled or data.test is None:
        return BaselineResults()

    def pairs(dataset: Samples | None) -> Pairs | None:
        return None if dataset is None else dataset.all()

    with console.status("baselines") as status:
        return run_baselines(
            pairs(data.train),
            pairs(data.val),
            data.test.all(),
            task=task,
            settings=settings,
            num_parameters=num_parameters,
            loss=loss,
            seed=seed,
            device=device,
            report=lambda step: status.update(f"baselines: {step}"),
            all_targets=all_targets,
        )


def run_test(
    trainer: Trainer,
    module: EnergyFlowModule,
    data: EnergyDataModule,
    ckpt_path: str | None,
    keep: Sequence[KeepRowScores],
) -> dict[str, float]:
    """Test the module, or a checkpoint of it.

    Args:
        keep: callbacks that write row scores.

    Returns:
        All metrics whose names begin with `test/`.

    Raises:
        KeyboardInterrupt: the process received a signal.
    """
    others = [callback for callback in trainer.callbacks if not isinstance(callback, KeepRowScores)]  # type: ignore[attr-defined]
    trainer.callbacks = [*others, *keep]  # type: ignore[attr-defined]
    with ended_by_signals(trainer):
        trainer.test(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}


def finish(
    settings: TrainSettings,
    trainer: Trainer,
    module: EnergyFlowModule,
    data: EnergyDataModule,
    metrics: dict[str, float],
    console: Console,
) -> Results:
    """Write the model's metrics; fit the baselines; write and show all results. Only the first process does this."""
    task = task_of(settings.optimized_metric)
    results = Results(task, metrics, BaselineResults())
    if not trainer.is_global_zero:
        return results
    write_metrics(results.flat(), settings.paths.output_dir)  # even if the baselines fail
    if f"test/{task.primary}" not in metrics:
        return results
    device = trainer.strategy.root_device
    baselines = fit_baselines(
        settings.baselines,
        data,
        task,
        num_parameters=module.num_parameters,
        loss=module.loss,
        seed=settings.seed,
        device=device,
        console=console,
    )
    results = Results(task, metrics, baselines)
    write_metrics(results.flat(), settings.paths.output_dir)
    add_row_scores(Path(settings.paths.output_dir, FILE), baselines.row_scores, console)
    model = {metric: metrics[f"test/{metric}"] for metric in task.headings if f"test/{metric}" in metrics}
    show_metrics(task, task.title, {ALONE: model, **baselines.metrics}, console)
    show_notes(baselines, console)
    if task is RETRIEVAL:
        show_examples(module, data, console)
    return results


def write_metrics(metrics: Mapping[str, float], output_dir: str | Path) -> None:
    """Write `metrics.json`; a value that is not finite becomes null, with a warning."""
    path = Path(output_dir) / "metrics.json"
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    atomic_write(path, json.dumps(finite, indent=2) + "\n")
    bad = [key for key, value in finite.items() if value is None]
    if bad:
        Console(stderr=True).print(f"not finite, null in {path}: {', '.join(bad)}", style="bold red")


def read_metrics(output_dir: str | Path) -> dict[str, Any]:
    """Read `metrics.json` of a finished run."""
    return dict(json.loads((Path(output_dir) / "metrics.json").read_text()))


def add_row_scores(path: Path, scores: Mapping[str, Tensor], console: Console) -> None:
    """Add the row scores of baselines to the file of the model, if there is one."""
    if path.is_file():
        write_row_scores(path, read_row_scores(path).with_methods(scores))
    else:
        console.print(f"no {path.name}: the test was limited to some of its rows (trainer.limit_test_batches)")
