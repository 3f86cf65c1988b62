"""Test a model, fit the baselines, and write what a run found."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import Tensor

from energy_flow.atomic import write_whole
from energy_flow.comparison.baselines import BaselineResults, run_baselines
from energy_flow.comparison.trained_baselines import Pairs
from energy_flow.data import EnergyDataModule
from energy_flow.data.samples import Samples
from energy_flow.metrics.retrieval import AllTargets
from energy_flow.metrics.row_scores import FILE, read_row_scores, write_row_scores
from energy_flow.metrics.task import RETRIEVAL, Task, task_of
from energy_flow.runs.settings import EvaluateSettings, TrainSettings
from energy_flow.runs.tables import show_examples, show_notes, show_table
from energy_flow.runs.training import ended_by_signals
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule


@dataclass(frozen=True)
class Results:
    """What a run found: metrics of the model's test, and the baselines beside it."""

    task: Task
    metrics: dict[str, float]  # flat: test/mrr, params, fit_seconds, ...
    baselines: BaselineResults

    def headlines(self) -> dict[str, float]:
        """The few numbers by which runs are compared."""
        tested = [f"test/{metric}" for metric in self.task.headings]
        names = [*tested, *self.task.optimized, "params", "fit_seconds"]
        return {name: self.metrics[name] for name in names if name in self.metrics}

    def flat(self) -> dict[str, float]:
        beside = {f"baseline/{b}/{m}": v for b, row in self.baselines.metrics.items() for m, v in row.items()}
        return {**self.metrics, **beside}


def hyper_parameters(settings: TrainSettings) -> dict[str, Any]:
    """The values that TensorBoard's hparams page compares, flat: those that change what is learnt."""
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
    settings: TrainSettings | EvaluateSettings,
    data: EnergyDataModule,
    num_parameters: int,
    loss: LossSettings,
    device: torch.device,
    console: Console,
    all_targets: AllTargets | None = None,
) -> BaselineResults:
    """The baselines on the run's data, or nothing where they are switched off or there is no test split.

    Args:
        num_parameters, loss: of the model beside which they stand.
        all_targets: as in `run_baselines`.
    """
    if not settings.baselines.enabled or data.test is None:
        return BaselineResults()

    def pairs(dataset: Samples | None) -> Pairs | None:
        return None if dataset is None else dataset.all()

    with console.status("baselines") as status:
        return run_baselines(
            pairs(data.train),
            pairs(data.val),
            data.test.all(),
            task=task_of(settings.optimized_metric),
            settings=settings.baselines,
            num_parameters=num_parameters,
            loss=loss,
            seed=settings.seed,
            device=device,
            report=lambda what: status.update(f"baselines: {what}"),
            all_targets=all_targets,
        )


def test(
    trainer: Trainer,
    module: EnergyFlowModule,
    data: EnergyDataModule,
    ckpt_path: str | None,
    keep: Mapping[str, Path],
) -> dict[str, float]:
    """Test metrics of the module, or of a checkpoint of it.

    Args:
        keep: which of the module's `test_rows` are written, and where.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    others = [callback for callback in trainer.callbacks if not isinstance(callback, KeepRowScores)]  # type: ignore[attr-defined]
    kept = [KeepRowScores(path, measure) for measure, path in keep.items()]
    trainer.callbacks = [*others, *kept]  # type: ignore[attr-defined]
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
    """Write what the model reached, then fit the baselines, write and show them beside it; on the first process."""
    task = task_of(settings.optimized_metric)
    results = Results(task, metrics, BaselineResults())
    if not trainer.is_global_zero:
        return results
    write_metrics(results.flat(), settings.paths.output_dir)  # whatever happens to the baselines
    if f"test/{task.headline}" not in metrics:
        return results
    device = trainer.strategy.root_device
    baselines = fit_baselines(settings, data, module.num_parameters, module.loss, device, console)
    results = Results(task, metrics, baselines)
    write_metrics(results.flat(), settings.paths.output_dir)
    write_baseline_rows(baselines.rows, Path(settings.paths.output_dir, FILE), console)
    model = {metric: metrics[f"test/{metric}"] for metric in task.headings if f"test/{metric}" in metrics}
    show_table(task, task.title, {"flow lattice": model, **baselines.metrics}, console)
    show_notes(baselines, console)
    if task is RETRIEVAL:
        show_examples(module, data, console)
    return results


def write_metrics(metrics: Mapping[str, float], output_dir: str | Path) -> None:
    """Write `metrics.json`, flat; a number that isn't finite is null, and said so."""
    path = Path(output_dir) / "metrics.json"
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    write_whole(path, (json.dumps(finite, indent=2) + "\n").encode())
    bad = [key for key, value in finite.items() if value is None]
    if bad:
        Console(stderr=True).print(f"not finite, null in {path}: {', '.join(bad)}", style="bold red")


def read_metrics(output_dir: str | Path) -> dict[str, Any]:
    """`metrics.json` of a finished run."""
    return dict(json.loads((Path(output_dir) / "metrics.json").read_text()))


def write_baseline_rows(rows: Mapping[str, Tensor], path: Path, console: Console) -> None:
    """Put the test rows of the baselines beside those of the model, where these were kept."""
    if path.is_file():
        write_row_scores(path, read_row_scores(path).beside(rows))
    else:
        console.print(f"no {path.name}: the test was limited to some of its rows (trainer.limit_test_batches)")
