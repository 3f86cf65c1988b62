"""A run: its config, its models and trainer, its results as a table and as `metrics.json`."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException
from torch.nn import functional

from energy_flow import signals
from energy_flow.atomic import write_whole
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.data import EnergyDataModule
from energy_flow.data.samples import Samples
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings
from energy_flow.training.baselines import BaselineResults, BaselineSettings, run_baselines
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.retrieval import AllTargets
from energy_flow.training.task import REGRESSION, RETRIEVAL, Task, task_of
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
    ckpt_path: str | Annotated[list[str], Field(min_length=1)]
    optimized_metric: str
    lattice: SizeSettings
    loss: LossSettings
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


def check_loss(optimized_metric: str, loss: LossSettings) -> None:
    """See that what a run is measured by is trained.

    Raises:
        ConfigError: errors count, and the loss doesn't know them: InfoNCE leaves even the length of an embedding open.
    """
    if task_of(optimized_metric) is REGRESSION and loss.mse == 0:
        raise ConfigError(
            f"optimized_metric = {optimized_metric}, with loss.mse = 0: errors count, and aren't trained. Set loss=mse"
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


@contextmanager
def ended_by_signals(trainer: Trainer) -> Iterator[None]:
    """Inside the trainer works; all ways in which a signal makes it end are one KeyboardInterrupt outside."""
    launcher = trainer.strategy.launcher
    try:
        with signals.passed_on(launcher.kill) if isinstance(launcher, _MultiProcessingLauncher) else nullcontext():
            yield
    except SystemExit:  # how Lightning and callbacks end
        raise KeyboardInterrupt from None
    except (ProcessExitedException, RuntimeError) as error:
        # A signal to all processes of a job ends data workers at once.
        ended = isinstance(error, ProcessExitedException) or str(error).startswith("DataLoader worker (pid")
        if not ended or signals.received() is None:
            raise
        raise KeyboardInterrupt from None


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
    others = [callback for callback in trainer.callbacks if not isinstance(callback, KeepTestRows)]  # type: ignore[attr-defined]
    kept = [KeepTestRows(path, measure) for measure, path in keep.items()]
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
        write_rows(path, read_rows(path).beside(rows))
    else:
        console.print(f"no {path.name}: the test was limited to some of its rows (trainer.limit_test_batches)")


def describe(module: EnergyFlowModule) -> str:
    """A model in one line."""
    lattice, model = module.processor.settings, module.processor.model
    frozen = f", {module.num_frozen:,} of them frozen" if module.num_frozen else ""
    return (
        f"flow lattice {lattice.width} x {lattice.height} x {lattice.depth}, energy dimension {model.energy_dim}, "
        f"{lattice.num_steps} step{'s' * (lattice.num_steps != 1)}, GRU {model.num_layers} x {model.hidden_size}: "
        f"{module.num_parameters:,} parameters{frozen}"
    )


def show_table(task: Task, title: str, rows: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Metrics of methods by name, the best method in bold; a metric that none of them has gets no column."""
    headings = {
        metric: heading for metric, heading in task.headings.items() if any(metric in row for row in rows.values())
    }
    best = math.nan
    for row in rows.values():
        found = row.get(task.headline, math.nan)
        best = found if task.improves(found, best) else best
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [task.shown(metric, row[metric]) if metric in row else "-" for metric in headings]
        table.add_row(Text(name), *cells, style="bold" if row.get(task.headline) == best else "")
    console.print(table)


def show_notes(baselines: BaselineResults, console: Console) -> None:
    """Why baselines were left out, and what was chosen for the others."""
    for name, reason in baselines.skipped.items():
        console.print(f"{name}: left out, {reason}")
    for name, detail in baselines.details.items():
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


def check_normalisation(trained: bool, data: EnergyDataModule, model: str = "the model") -> None:
    """See that rows are prepared as those that a model was trained with.

    Args:
        model: what the message calls it.

    Raises:
        ConfigError: they aren't.
    """
    if trained != data.settings.normalize:
        value = str(trained).lower()
        raise ConfigError(
            f"data.normalize = {str(data.settings.normalize).lower()}: {model} was trained with {value}. "
            f"Set data.normalize={value}"
        )


def say_whose_data(
    trained_on: dict[str, str], data: EnergyDataModule, console: Console, model: str = "the checkpoint"
) -> None:
    """Say where data differ from those of the run that wrote a checkpoint; `model` is what it is called."""
    differing = [split for split, digest in data.fingerprint.items() if digest != trained_on.get(split)]
    if differing:
        said = f"other data than those that {model} was trained with: {', '.join(differing)}"
        console.print(said, markup=False, soft_wrap=True)
