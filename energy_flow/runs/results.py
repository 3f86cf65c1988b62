"""Test a model, fit the baselines, write and show the results of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from torch import Tensor

from energy_flow.atomic import atomic_write
from energy_flow.comparison.baselines import BaselineResults, run_baselines
from energy_flow.comparison.compare import ALONE
from energy_flow.data import OwnData, RunData
from energy_flow.metrics.retrieval import AllTargets
from energy_flow.metrics.row_scores import FILE, read_row_scores, write_row_scores
from energy_flow.metrics.task import RETRIEVAL
from energy_flow.runs.screen import show_examples, show_metrics, show_notes
from energy_flow.runs.settings import ScoredSettings, TrainSettings
from energy_flow.runs.training import ended_by_signals
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule


def fit_baselines(
    settings: ScoredSettings,
    trainer: Trainer,
    module: EnergyFlowModule,
    data: RunData,
    loss: LossSettings,
    all_targets: AllTargets | None = None,
) -> BaselineResults:
    """Fit and test baselines of a module's size; no results if they are disabled or there is no test split."""
    if isinstance(data, OwnData):
        return BaselineResults(skipped={"baselines": "data._target_ gives batches, and they need whole splits"})
    if not settings.baselines.enabled or data.test is None:
        return BaselineResults()
    with Console().status("baselines") as status:
        return run_baselines(
            None if data.train is None else data.train.all(),
            None if data.val is None else data.val.all(),
            data.test.all(),
            task=settings.task,
            settings=settings.baselines,
            num_parameters=module.num_parameters,
            loss=loss,
            seed=settings.seed,
            device=trainer.strategy.root_device,
            report=lambda step: status.update(f"baselines: {step}"),
            all_targets=all_targets,
        )


def run_test(
    trainer: Trainer,
    module: EnergyFlowModule,
    data: RunData,
    ckpt_path: str | None,
    keep: Sequence[KeepRowScores],
) -> dict[str, float]:
    """Test the module, or a checkpoint of it; `keep` are callbacks that write row scores.

    Returns:
        All metrics whose names begin with `test/`.
    """
    others = [callback for callback in trainer.callbacks if not isinstance(callback, KeepRowScores)]  # type: ignore[attr-defined]
    trainer.callbacks = [*others, *keep]  # type: ignore[attr-defined]
    with ended_by_signals(trainer):
        trainer.test(module, datamodule=data.loaders, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}


def finish(
    settings: TrainSettings,
    trainer: Trainer,
    module: EnergyFlowModule,
    data: RunData,
    metrics: dict[str, float],
    console: Console,
) -> None:
    """Write the model's metrics; fit the baselines; write and show all results. Only the first process does this."""
    if not trainer.is_global_zero:
        return
    task, folder = settings.task, Path(settings.paths.output_dir)
    write_metrics(metrics, folder)  # even if the baselines fail
    if f"test/{task.primary}" not in metrics:
        return
    baselines = fit_baselines(settings, trainer, module, data, module.loss)
    flat = {f"baseline/{name}/{metric}": v for name, row in baselines.metrics.items() for metric, v in row.items()}
    write_metrics({**metrics, **flat}, folder)
    if data.test is not None:
        add_row_scores(folder / FILE, baselines.row_scores, console)
    model = {metric: metrics[f"test/{metric}"] for metric in task.headings if f"test/{metric}" in metrics}
    show_metrics(task, task.title, {ALONE: model, **baselines.metrics}, console)
    show_notes(baselines, console)
    if task is RETRIEVAL:
        show_examples(module, data, console)


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
