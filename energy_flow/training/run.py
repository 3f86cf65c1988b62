"""A run: its config, its models and trainer, its results as a table and as `metrics.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from energy_flow.atomic import write_whole
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.data import EnergyDataModule
from energy_flow.data.samples import Samples
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings
from energy_flow.training.baselines import BaselineResults, BaselineSettings, run_baselines
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.task import RETRIEVAL, Task, task_of
from energy_flow.training.test_rows import FILE, KeepTestRows, read_rows, write_rows
from energy_flow.training.trained_baselines import Pairs

EXAMPLES = 5


class PathSettings(Settings):
    """Config group `paths`."""

    log_dir: str
    output_dir: str


Section = dict[str, Any]


class TrainSettings(Settings):
    """The whole config of a training run. Sections are checked by the classes that own them."""

    task_name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    ckpt_path: str | None
    resume: Literal["auto"] | None
    optimized_metric: str
    test: bool
    baselines: BaselineSettings
    lattice: Section
    model: Section
    data: Section
    loss: Section
    optimizer: Section
    rollout: Section
    trainer: Section
    callbacks: Section | None = None
    logger: Section | None = None
    paths: PathSettings

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        if self.resume is not None and self.ckpt_path is not None:
            raise ValueError(f"resume = {self.resume} and ckpt_path = {self.ckpt_path}: give one of them")
        return self

    @property
    def checkpoint_folder(self) -> Path:
        """Where the run keeps the checkpoints that it goes on from."""
        last = (self.callbacks or {}).get("last_checkpoint") or {}
        return Path(last.get("dirpath", Path(self.paths.output_dir, "checkpoints")))


class SizeSettings(Settings):
    """Cells of a lattice to evaluate on; None: as many as in the checkpoint."""

    width: Annotated[int, Field(ge=1)] | None
    height: Annotated[int, Field(ge=1)] | None


class EvaluateSettings(Settings):
    """The whole config of an evaluation."""

    task_name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    ckpt_path: str
    optimized_metric: str
    lattice: SizeSettings
    baselines: BaselineSettings
    data: Section
    rollout: Section
    trainer: Section
    paths: PathSettings


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
    module: EnergyFlowModule,
    device: torch.device,
    console: Console,
) -> BaselineResults:
    """The baselines on the run's data, or nothing where they are switched off or there is no test split."""
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
            num_parameters=module.num_parameters,
            loss=module.loss,
            seed=settings.seed,
            device=device,
            report=lambda what: status.update(f"baselines: {what}"),
        )


def refuse_processes(trainer: Trainer, lattice: LatticeSettings, multirun: bool) -> None:
    """Find what several processes can't do, before they start.

    Raises:
        ConfigError: a multirun whose jobs launch the script several times (each would start the whole sweep again), or
            a lattice without steps, whose carrier gets no gradient.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and lattice.num_steps == 0:
        raise ConfigError(
            "lattice.max_steps = 0 (or lattice.depth = 1): neuron and carrier get no gradient, and several processes "
            "would wait for it. Set trainer.devices=1"
        )
    if multirun and isinstance(strategy.launcher, _SubprocessScriptLauncher):
        raise ConfigError(
            "trainer.devices: a multirun can't start several processes per job, every one of them would run the "
            "whole sweep. Set trainer.devices=1, or trainer.strategy=ddp_spawn"
        )


def test(
    settings: TrainSettings | EvaluateSettings,
    trainer: Trainer,
    module: EnergyFlowModule,
    data: EnergyDataModule,
    ckpt_path: str | None,
) -> dict[str, float]:
    """Test metrics of the module, or of a checkpoint of it; its test rows are kept in the run folder.

    Ctrl-C ends the program with 130.
    """
    measure = task_of(settings.optimized_metric).row_measure
    trainer.callbacks.append(KeepTestRows(Path(settings.paths.output_dir, FILE), measure))  # type: ignore[attr-defined]
    try:
        trainer.test(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    except SystemExit:  # how Lightning ends on Ctrl-C
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from None
        raise
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}


def finish(
    settings: TrainSettings | EvaluateSettings,
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
    write_metrics(results, settings.paths.output_dir)  # whatever happens to the baselines
    if f"test/{task.headline}" not in metrics:
        return results
    results = Results(task, metrics, fit_baselines(settings, data, module, trainer.strategy.root_device, console))
    write_metrics(results, settings.paths.output_dir)
    _write_baseline_rows(results, Path(settings.paths.output_dir, FILE), console)
    show_results(results, console)
    if task is RETRIEVAL:
        show_examples(module, data, console)
    return results


def write_metrics(results: Results, output_dir: str | Path) -> None:
    """Write `metrics.json`, flat; a number that isn't finite is null, and said so."""
    path = Path(output_dir) / "metrics.json"
    flat = results.flat()
    finite = {key: value if math.isfinite(value) else None for key, value in flat.items()}
    write_whole(path, (json.dumps(finite, indent=2) + "\n").encode())
    bad = [key for key, value in finite.items() if value is None]
    if bad:
        Console(stderr=True).print(f"not finite, null in {path}: {', '.join(bad)}", style="bold red")


def read_metrics(output_dir: str | Path) -> dict[str, Any]:
    """`metrics.json` of a finished run."""
    return dict(json.loads((Path(output_dir) / "metrics.json").read_text()))


def _write_baseline_rows(results: Results, path: Path, console: Console) -> None:
    """Put the test rows of the baselines beside those of the model, where these were kept."""
    if path.is_file():
        write_rows(path, read_rows(path).beside(results.baselines.rows))
    else:
        console.print(f"no {path.name}: the test was limited to some of its rows (trainer.limit_test_batches)")


def show_results(results: Results, console: Console) -> None:
    """The table: the model beside the baselines, the best in bold."""
    task = results.task
    tested = {metric: results.metrics.get(f"test/{metric}") for metric in task.headings}
    model = {metric: value for metric, value in tested.items() if value is not None}
    rows = {"flow lattice": model, **results.baselines.metrics}
    best = math.nan
    for row in rows.values():
        found = row.get(task.headline, math.nan)
        best = found if task.improves(found, best) else best
    table = Table(title=task.title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in task.headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [task.shown(metric, row[metric]) if metric in row else "-" for metric in task.headings]
        table.add_row(name, *cells, style="bold" if row.get(task.headline) == best else "")
    console.print(table)
    for name, reason in results.baselines.skipped.items():
        console.print(f"{name}: left out, {reason}")
    for name, detail in results.baselines.details.items():
        console.print(f"{name}: {detail}", style="dim", highlight=False, soft_wrap=True)


def show_examples(module: EnergyFlowModule, data: EnergyDataModule, console: Console) -> None:
    """The nearest targets of a few test rows by name, where rows have names."""
    dataset = data.test
    if dataset is None or dataset.names is None:
        return
    rows = list(range(min(EXAMPLES, len(dataset))))
    batch, (_, targets) = dataset.__getitems__(rows), dataset.all()
    with torch.no_grad():
        prediction = module.eval()(batch["source"].to(module.device)).embedding.cpu().float()
    scores = functional.normalize(prediction, dim=-1) @ functional.normalize(targets, dim=-1).T
    console.print("nearest targets of the first test rows:")
    for row, nearest in zip(rows, scores.topk(min(3, len(dataset))).indices.tolist(), strict=True):
        names = ", ".join(dataset.names[index] for index in nearest)
        console.print(f"  {dataset.names[row]}: {names}", highlight=False, markup=False, soft_wrap=True)


def find_device(name: str) -> torch.device:
    """The device of a config key `device`: cpu, cuda or auto.

    Raises:
        ConfigError: cuda, and there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no GPU here. Set device=auto")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def check_normalisation(trained: bool, data: EnergyDataModule) -> None:
    """See that rows are prepared as those that a model was trained with.

    Raises:
        ConfigError: they aren't.
    """
    if trained != data.settings.normalize:
        value = str(trained).lower()
        raise ConfigError(
            f"data.normalize = {str(data.settings.normalize).lower()}: the model was trained with {value}. "
            f"Set data.normalize={value}"
        )


def say_whose_data(trained_on: dict[str, str], data: EnergyDataModule, console: Console) -> None:
    """Say where data differ from those of the run that wrote a checkpoint."""
    differing = [split for split, digest in data.fingerprint.items() if digest != trained_on.get(split)]
    if differing:
        console.print(
            f"not the data that the checkpoint was trained with: {', '.join(differing)} differ", soft_wrap=True
        )
