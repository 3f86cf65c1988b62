"""Test one or several trained models and compare them with baselines: python -m energy_flow.evaluate ckpt_path=..."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from energy_flow.comparison import compare
from energy_flow.comparison.baselines import BaselineResults
from energy_flow.comparison.compare import ALONE, Comparison, Method
from energy_flow.comparison.report import interval_table
from energy_flow.data import EnergyDataModule
from energy_flow.errors import CheckpointError, ConfigError, EnergyFlowError
from energy_flow.metrics.retrieval import AllTargets, rank_metrics
from energy_flow.metrics.row_scores import MODEL, read_row_scores
from energy_flow.metrics.task import RETRIEVAL, task_of
from energy_flow.runs.application import application
from energy_flow.runs.checks import say_whose_data
from energy_flow.runs.log import filter_warnings
from energy_flow.runs.models import Model, load_checkpoint, model_keys, restore_model
from energy_flow.runs.results import add_row_scores, fit_baselines, run_test, write_metrics
from energy_flow.runs.screen import describe, show_examples, show_metrics, show_notes
from energy_flow.runs.settings import ScoredSettings
from energy_flow.runs.trainer import build_trainer
from energy_flow.settings import Settings, read
from energy_flow.tables import print_text
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from energy_flow.training.callbacks.progress_bar import ProgressBar
from energy_flow.training.losses import LossSettings

Metrics = Mapping[str, float]

_ALL = "_all"  # suffix of all results among the targets of all splits


class SizeSettings(Settings):
    """Cells of the lattice in an evaluation; None: as many as in the checkpoint."""

    width: Annotated[int, Field(ge=1)] | None
    height: Annotated[int, Field(ge=1)] | None


class EvaluateSettings(ScoredSettings):
    """The whole config of an evaluation."""

    ckpt_path: str | Annotated[list[str], Field(min_length=1)]
    lattice: SizeSettings
    loss: LossSettings
    data: dict[str, Any]
    rollout: dict[str, Any]
    trainer: dict[str, Any]


def evaluate(config: dict[str, Any]) -> float:
    """Test one or several models and compare them with the baselines; returns the (mean) test metric to optimize."""
    filter_warnings()
    settings = read(EvaluateSettings, config, "")
    task_of(settings.optimized_metric)  # refused before the models are read
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    paths = [settings.ckpt_path] if isinstance(settings.ckpt_path, str) else settings.ckpt_path
    keys = model_keys(paths)
    loaded = [load_checkpoint(path, settings.loss) for path in paths]
    data = EnergyDataModule.from_config(config)
    data.setup("test")
    options = {**settings.lattice.model_dump(), "rollout": settings.rollout, "loss": settings.loss}
    models = [restore_model(*each, data, **options) for each in zip(keys, paths, loaded, strict=True)]
    return Evaluation(settings, data, models).run()


class Evaluation:
    """Tests models on the same data, then compares them."""

    def __init__(self, settings: EvaluateSettings, data: EnergyDataModule, models: list[Model]) -> None:
        self.settings, self.data, self.models = settings, data, models
        self.task = task_of(settings.optimized_metric)
        bar, folder = ProgressBar(leave=False), settings.paths.output_dir
        self.trainer = build_trainer(settings.trainer, callbacks=[bar], loggers=[], output_dir=folder)
        self.console = Console(quiet=not self.trainer.is_global_zero)
        self.suffixes = ("", _ALL) if self.task is RETRIEVAL else ("",)
        self.all_targets: AllTargets | None = None
        if self.task is RETRIEVAL and data.test is not None:
            target = torch.cat([split.all()[1] for split in data.splits().values()])  # the test split is the last one
            self.all_targets = AllTargets(target, len(target) - len(data.test))

    def run(self) -> float:
        """Test the models; on the first process also compare them with the baselines, write and show all results."""
        for model in self.models:
            print_text(self.console, f"{model.path}: {describe(model.module)}")
            name = "the checkpoint" if model.key == MODEL else model.key
            say_whose_data(model.module.fingerprint, self.data, self.console, name)
        tested = {model.key: self._test(model) for model in self.models}
        metrics = _flat(tested)
        if self.trainer.is_global_zero:
            metrics |= self._compare(tested, metrics)
        return metrics[self.settings.optimized_metric.replace("val/", "test/")]

    def _test(self, model: Model) -> dict[str, float]:
        """Test a model and write its row scores; returns its metrics by their names for a single model."""
        keep = [
            KeepRowScores(
                self._rows_path(suffix, model), self.task.row_measure + suffix, self.all_targets if suffix else None
            )
            for suffix in self.suffixes
        ]
        try:
            metrics = run_test(self.trainer, model.module, self.data, None, keep)
        except EnergyFlowError as error:
            raise CheckpointError(f"ckpt_path = {model.path}: {error}") from error
        if not metrics:
            raise ConfigError("trainer.limit_test_batches = 0: nothing is tested. Raise it")
        return {**metrics, "params": float(model.module.num_parameters)}

    def _read_rows(self, suffix: str) -> dict[str, Tensor]:
        """Row scores [N] by model, read back because another process may have had them; none of a limited test."""
        paths = {model.key: self._rows_path(suffix, model) for model in self.models}
        return {key: read_row_scores(path).values[MODEL] for key, path in paths.items() if path.is_file()}

    def _rows_path(self, suffix: str, model: Model) -> Path:
        """The file of a model's row scores."""
        key = "" if model.key == MODEL else f"_{model.key}"
        return Path(self.settings.paths.output_dir, f"test{suffix}_rows{key}.safetensors")

    def _compare(self, tested: Mapping[str, Metrics], metrics: dict[str, float]) -> dict[str, float]:
        """Fit the baselines, then write and show the comparison; returns its metrics."""
        folder = self.settings.paths.output_dir
        write_metrics(metrics, folder)  # even if the baselines fail
        baselines = self._fit_baselines()
        rows = {suffix: self._read_rows(suffix) for suffix in self.suffixes}
        comparisons = {
            suffix: self._comparison(suffix, tested, rows[suffix], baselines)
            for suffix in self.suffixes
            if not suffix or len(rows[suffix]) == len(tested)  # a limited test gives no ranks among all targets
        }
        pairs = compare.pairs_of(comparisons[""])
        found: dict[str, float] = {}
        for suffix, comparison in comparisons.items():
            found |= compare.flat_metrics(comparison, pairs, suffix)
        if self.all_targets is not None and _ALL in comparisons:
            found["test_all/candidates"] = float(len(self.all_targets.target))
        write_metrics({**metrics, **found}, folder)
        self._show(comparisons, baselines)
        print_text(self.console, f"run folder: {folder}")
        return found

    def _fit_baselines(self) -> BaselineResults:
        """Fit the baselines with the first model's size and loss; add their row scores to the file of every model."""
        first = self.models[0]
        baselines = fit_baselines(self.settings, self.trainer, first.module, self.data, first.loss, self.all_targets)
        scores = {"": baselines.row_scores, _ALL: baselines.all_row_scores}
        for model in self.models:
            for suffix in self.suffixes:
                add_row_scores(self._rows_path(suffix, model), scores[suffix], self.console)
        return baselines

    def _comparison(
        self, suffix: str, tested: Mapping[str, Metrics], rows: Mapping[str, Tensor], baselines: BaselineResults
    ) -> Comparison:
        """The models, their mean if there are several, and the baselines."""

        def method(key: str, metrics: Metrics, scores: Tensor | None, is_baseline: bool) -> Method:
            own = rank_metrics(scores) if suffix and scores is not None else metrics
            complete = len(rows) == len(tested)
            primary = self.task.primary_scores(scores).unsqueeze(0) if complete and scores is not None else None
            return Method(key, ALONE if key == MODEL else key, is_baseline, own, primary)

        models = []
        for key, metrics in tested.items():
            own = {name: metrics[f"test/{name}"] for name in self.task.headings if f"test/{name}" in metrics}
            models.append(method(key, own, rows.get(key), False))
        if len(models) > 1:
            models.append(compare.mean_model(models))
        scores = baselines.all_row_scores if suffix else baselines.row_scores
        fitted = [method(name, metrics, scores[name], True) for name, metrics in baselines.metrics.items()]
        return Comparison(self.task, models + fitted)

    def _show(self, comparisons: Mapping[str, Comparison], baselines: BaselineResults) -> None:
        titles, headings = {"": self.task.title}, {"": self.task.primary_heading}
        if self.all_targets is not None:
            number = f"{len(self.all_targets.target):,}"
            titles[_ALL] = f"Test: among all {number} targets ({', '.join(self.data.splits())})"
            headings[_ALL] = f"among {number}"
        for suffix, comparison in comparisons.items():
            metrics = {method.name: method.metrics for method in comparison.methods.values()}
            show_metrics(self.task, titles[suffix], metrics, self.console)
        intervals = interval_table({headings[suffix]: comparison for suffix, comparison in comparisons.items()})
        if intervals is not None:
            self.console.print(intervals)
        show_notes(baselines, self.console)
        if len(self.models) > 1 and baselines.metrics:
            print_text(self.console, f"baselines: as many parameters as {self.models[0].key}, and its loss")
        if len(self.models) == 1 and self.task is RETRIEVAL:
            show_examples(self.models[0].module, self.data, self.console)


def _flat(tested: Mapping[str, Metrics]) -> dict[str, float]:
    """Metrics of a single model; for several models `model/KEY/...` and the means `test/...`."""
    if MODEL in tested:
        return dict(tested[MODEL])
    flat = {f"model/{key}/{name.removeprefix('test/')}": v for key, own in tested.items() for name, v in own.items()}
    means = compare.mean_metrics(list(tested.values()))
    return {**flat, **{name: value for name, value in means.items() if name.startswith("test/")}}


main = application("evaluate")(evaluate)

if __name__ == "__main__":
    main()
