"""One or several trained models beside the baselines: python -m energy_flow.evaluate ckpt_path=... [key=value ...]"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.comparison.baselines import NEEDS, BaselineResults
from energy_flow.comparison.side_by_side import MEAN, Method, SideBySide, short_names, show_how_sure
from energy_flow.data import EnergyDataModule
from energy_flow.errors import CheckpointError, ConfigError, EnergyFlowError
from energy_flow.metrics.retrieval import AllTargets, rank_metrics
from energy_flow.metrics.row_scores import MODEL, read_row_scores
from energy_flow.metrics.task import RETRIEVAL, task_of
from energy_flow.pretrained.card import read_model
from energy_flow.runs.application import application
from energy_flow.runs.checks import check_normalisation, say_whose_data
from energy_flow.runs.log import filter_warnings
from energy_flow.runs.results import fit_baselines, test, write_baseline_rows, write_metrics
from energy_flow.runs.settings import EvaluateSettings
from energy_flow.runs.tables import describe, show_examples, show_notes, show_table
from energy_flow.runs.trainer import build_trainer
from energy_flow.settings import read
from energy_flow.training.callbacks.progress_bar import ProgressBar
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule

_ALL = "_all"  # ends the names of what is measured among the targets of all splits


@dataclass(frozen=True)
class Model:
    """A model to test.

    Attributes:
        key: `model` where it is the only one, otherwise what tells it apart.
        path: as given.
        loss: what baselines beside it are trained with.
    """

    key: str
    path: str
    module: EnergyFlowModule
    loss: LossSettings


@dataclass(frozen=True)
class Tested:
    """What a model reached: metrics by their names in `metrics.json`, and the rows [N] that were kept, by suffix."""

    metrics: dict[str, float]
    rows: dict[str, Tensor]


def evaluate(config: dict[str, Any]) -> float:
    """Test one or several models beside the baselines.

    Returns:
        The test metric of the name of `optimized_metric`; of several models the mean.
    """
    settings = read(EvaluateSettings, config, "")
    task_of(settings.optimized_metric)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    paths = [settings.ckpt_path] if isinstance(settings.ckpt_path, str) else settings.ckpt_path
    keys = _keys(paths)
    checkpoints_read = [_load(path, settings.loss) for path in paths]
    data = EnergyDataModule.from_config(config)
    data.setup("test")
    models = [_model(settings, data, *each) for each in zip(keys, paths, checkpoints_read, strict=True)]
    return Evaluation(settings, data, models).run()


def _keys(paths: list[str]) -> list[str]:
    files = [Path(path).expanduser().absolute() for path in paths]
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise ConfigError(f"ckpt_path = {paths[number]}: given twice; leave one out")
    return [MODEL] if len(files) == 1 else short_names(files, {MODEL, MEAN, *NEEDS})


def _load(path: str, loss: LossSettings) -> dict[str, Any]:
    """A checkpoint of training, or a file of `save_pretrained` in its form, with this loss at its first temperature.

    Without its optimiser, which isn't needed here: a checkpoint may be older than one of the keys of that section.

    Raises:
        CheckpointError: it isn't there, or can't be used.
    """
    if not _is_pretrained(path):
        checkpoint = checkpoints.load(path)
        return {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], "optimizer": None}}
    card, weights = read_model(Path(path).expanduser())
    described = {
        "dim": card.dim,
        "lattice": card.lattice.model_dump(),
        "model": card.model.model_dump(),
        "loss": {**loss.model_dump(), "learn_temperature": False},
        "optimizer": None,
        "seed": card.seed,
    }
    config = {"data": {"normalize": card.normalize}}
    return {
        "hyper_parameters": described,
        "state_dict": {f"processor.{name}": value for name, value in weights.items()},
        checkpoints.KEY: checkpoints.provenance(config, card.dim, card.data_fingerprint),
    }


def _is_pretrained(path: str) -> bool:
    return Path(path).suffix == ".safetensors"


def _model(
    settings: EvaluateSettings, data: EnergyDataModule, key: str, path: str, checkpoint: dict[str, Any]
) -> Model:
    size = settings.lattice
    checkpoint = compatibility.on_lattice(checkpoint, size.width, size.height, data.dim, path)
    module = compatibility.restore(EnergyFlowModule, checkpoint, path, settings.rollout)
    trained_on = (module.run_config or {}).get("data", {})
    check_normalisation(trained_on.get("normalize", data.settings.normalize), data, f"ckpt_path = {path}: the model")
    return Model(key, path, module, settings.loss if _is_pretrained(path) else module.loss)


class Evaluation:
    """One evaluation: its models, what they are tested on, and where the results go."""

    def __init__(self, settings: EvaluateSettings, data: EnergyDataModule, models: list[Model]) -> None:
        self.settings, self.data, self.models = settings, data, models
        self.task = task_of(settings.optimized_metric)
        self.trainer = build_trainer(
            settings.trainer,
            callbacks=[ProgressBar(leave=False)],
            loggers=[],
            output_dir=settings.paths.output_dir,
        )
        self.console = Console(quiet=not self.trainer.is_global_zero)
        self.all_targets = _all_targets(data) if self.task is RETRIEVAL else None
        self.suffixes = ("", _ALL) if self.task is RETRIEVAL else ("",)

    def run(self) -> float:
        """Test the models, then fit the baselines, write and show them beside the models; on the first process."""
        for model in self.models:
            self.console.print(f"{model.path}: {describe(model.module)}", highlight=False, markup=False, soft_wrap=True)
            name = "the checkpoint" if model.key == MODEL else model.key
            say_whose_data(model.module.fingerprint, self.data, self.console, name)
        tested = {model.key: self._test(model) for model in self.models}
        metrics = _flat(tested)
        if self.trainer.is_global_zero:
            folder = self.settings.paths.output_dir
            write_metrics(metrics, folder)  # whatever happens to the baselines
            baselines = self._fit_baselines()
            comparisons = [self._comparison(suffix, tested, baselines) for suffix in self._measured(tested)]
            pairs = comparisons[0].pairs()
            for comparison in comparisons:
                metrics |= comparison.flat(pairs)
            if self.all_targets is not None and len(comparisons) > 1:
                metrics["test_all/candidates"] = float(len(self.all_targets.target))
            write_metrics(metrics, folder)
            self._show(comparisons, baselines)
            self.console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
        return metrics[self.settings.optimized_metric.replace("val/", "test/")]

    def _test(self, model: Model) -> Tested:
        """Test a model; its rows are read from the run folder, as another process may have them."""
        paths = {suffix: self._rows_path(suffix, model) for suffix in self.suffixes}
        keep = {self.task.row_measure + suffix: path for suffix, path in paths.items()}
        model.module.all_targets = self.all_targets
        try:
            metrics = test(self.trainer, model.module, self.data, None, keep)
        except EnergyFlowError as error:
            raise CheckpointError(f"ckpt_path = {model.path}: {error}") from error
        model.module.all_targets = None
        if not metrics:
            raise ConfigError("trainer.limit_test_batches = 0: nothing is tested. Raise it")
        rows = {}
        if self.trainer.is_global_zero:
            rows = {suffix: read_row_scores(path).values[MODEL] for suffix, path in paths.items() if path.is_file()}
        return Tested({**metrics, "params": float(model.module.num_parameters)}, rows)

    def _rows_path(self, suffix: str, model: Model) -> Path:
        """Where the rows of a model are kept."""
        which = "" if model.key == MODEL else f"_{model.key}"
        return Path(self.settings.paths.output_dir, f"test{suffix}_rows{which}.safetensors")

    def _fit_baselines(self) -> BaselineResults:
        """Baselines of the first model's size and loss; their rows are put beside those of every model."""
        module, loss = self.models[0].module, self.models[0].loss
        device = self.trainer.strategy.root_device
        baselines = fit_baselines(
            self.settings, self.data, module.num_parameters, loss, device, self.console, self.all_targets
        )
        rows = {"": baselines.rows, _ALL: baselines.all_rows}
        for model in self.models:
            for suffix in self.suffixes:
                write_baseline_rows(rows[suffix], self._rows_path(suffix, model), self.console)
        return baselines

    def _measured(self, tested: Mapping[str, Tested]) -> list[str]:
        """The suffixes of what there is of every model: among all targets nothing but rows."""
        return [
            suffix for suffix in self.suffixes if not suffix or all(suffix in found.rows for found in tested.values())
        ]

    def _comparison(self, suffix: str, tested: Mapping[str, Tested], baselines: BaselineResults) -> SideBySide:
        def method(metrics: Mapping[str, float], rows: Tensor | None) -> Method:
            shares = None if rows is None else self.task.primary_of_rows(rows).unsqueeze(0)
            return Method(dict(metrics) if not suffix or rows is None else rank_metrics(rows), shares)

        models = {}
        for key, found in tested.items():
            metrics = {
                name: found.metrics[f"test/{name}"] for name in self.task.headings if f"test/{name}" in found.metrics
            }
            models[key] = method(metrics, found.rows.get(suffix))
        rows = baselines.all_rows if suffix else baselines.rows
        beside = {name: method(baselines.metrics[name], rows[name]) for name in baselines.metrics}
        return SideBySide(self.task, models, beside, suffix)

    def _show(self, comparisons: list[SideBySide], baselines: BaselineResults) -> None:
        labels = {MODEL: "flow lattice", MEAN: f"mean of {len(self.models)}"}
        titles, headings = [self.task.title], [self.task.headings[self.task.headline]]
        if self.all_targets is not None:
            number = f"{len(self.all_targets.target):,}"
            titles.append(f"Test: among all {number} targets ({', '.join(self.data.splits())})")
            headings.append(f"among {number}")
        for comparison, title in zip(comparisons, titles, strict=False):
            rows = {labels.get(key, key): found.metrics for key, found in comparison.methods.items()}
            show_table(self.task, title, rows, self.console)
        show_how_sure(dict(zip(headings, comparisons, strict=False)), labels, self.console)
        show_notes(baselines, self.console)
        if len(self.models) > 1 and baselines.metrics:
            beside = f"baselines: as many parameters as {self.models[0].key}, and its loss"
            self.console.print(beside, markup=False, soft_wrap=True)
        if len(self.models) == 1 and self.task is RETRIEVAL:
            show_examples(self.models[0].module, self.data, self.console)


def _all_targets(data: EnergyDataModule) -> AllTargets:
    """The targets of all splits there are, those of the test last."""
    target = torch.cat([dataset.all()[1] for dataset in data.splits().values()])
    assert data.test is not None
    return AllTargets(target, len(target) - len(data.test))


def _flat(tested: Mapping[str, Tested]) -> dict[str, float]:
    """Metrics of the only model; or those of each by its key, and as `test/...` the means of what all of them have."""
    if MODEL in tested:
        return tested[MODEL].metrics
    flat = {
        f"model/{key}/{name.removeprefix('test/')}": value
        for key, found in tested.items()
        for name, value in found.metrics.items()
    }
    mean = Method.mean([Method(found.metrics, None) for found in tested.values()]).metrics
    return {**flat, **{name: value for name, value in mean.items() if name.startswith("test/")}}


@application("evaluate")
def main(config: dict[str, Any]) -> float:
    """Entry point."""
    filter_warnings()
    return evaluate(config)


if __name__ == "__main__":
    main()
