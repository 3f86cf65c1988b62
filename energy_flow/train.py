"""Train a flow lattice: python -m energy_flow.train [key=value ...]"""

import gc
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from energy_flow import signals
from energy_flow.checkpoints import format as checkpoints
from energy_flow.checkpoints.exact_resume import ExactResume
from energy_flow.checkpoints.interrupt import SaveOnInterrupt
from energy_flow.checkpoints.io import LAST, AtomicCheckpointIO
from energy_flow.core.faults import REMEDY
from energy_flow.data import EnergyDataModule
from energy_flow.errors import CheckpointError, ConfigError, EnergyFlowError, NotFiniteError
from energy_flow.metrics.row_scores import FILE
from energy_flow.metrics.task import task_of
from energy_flow.runs import folder as run_folder
from energy_flow.runs.application import application
from energy_flow.runs.checks import check_loss, refuse_processes, say_whose_data
from energy_flow.runs.instantiate import build_all, build_loggers
from energy_flow.runs.job import is_multirun, resume_command
from energy_flow.runs.log import filter_warnings
from energy_flow.runs.messages import unwritable
from energy_flow.runs.results import finish, hyper_parameters, read_metrics, run_test
from energy_flow.runs.screen import describe
from energy_flow.runs.settings import TrainSettings
from energy_flow.runs.trainer import build_trainer, ended_by_signals
from energy_flow.settings import read
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from energy_flow.training.module import EnergyFlowModule

log = logging.getLogger(__name__)


def train(config: dict[str, Any]) -> float | None:
    """One run from its config to its results.

    Returns:
        The best value of `optimized_metric`, None for a run without a checkpoint callback.
    """
    settings = read(TrainSettings, config, "")
    task_of(settings.optimized_metric)
    folder = Path(settings.paths.output_dir)
    if settings.resume == "auto" and is_multirun():
        raise ConfigError(
            "resume = auto: is for single runs. Go on with the jobs of a multirun one by one, by ckpt_path"
        )
    if settings.resume == "auto" and run_folder.is_finished(folder):
        print(
            f"run folder: {folder}\nfinished already, there is nothing to go on with. To train longer give "
            f"ckpt_path={settings.checkpoint_folder / LAST} and a higher trainer.max_epochs, without resume"
        )
        return read_metrics(folder).get(settings.optimized_metric)
    with run_folder.held(folder):
        try:
            value = _train(config, settings)
        except (OSError, ValueError) as error:  # ValueError: what Lightning makes of an error of TensorBoard's
            found = unwritable(error)
            if found is None:
                raise
            raise EnergyFlowError(f"{found} {_by_resume(settings)}") from error
        run_folder.mark_finished(folder)
        return value


def _train(config: dict[str, Any], settings: TrainSettings) -> float | None:
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    data = EnergyDataModule.from_config(config)
    data.setup("fit")
    module = EnergyFlowModule.from_config(config, data.dim)
    check_loss(settings.optimized_metric, module.loss)
    module.run_config = config
    console = Console()
    ckpt_path = _goes_on_from(settings)
    step = 0 if settings.resume == "auto" else None
    if ckpt_path is not None:
        checkpoint = checkpoints.load(ckpt_path)
        checkpoints.check_resume(checkpoint, module.hparams, ckpt_path)
        checkpoints.check_weights(checkpoint["state_dict"], module, ckpt_path)
        say_whose_data(checkpoints.origin(checkpoint)[1], data, console)
        console.print(f"going on from step {checkpoint['global_step']} of {ckpt_path}", highlight=False, soft_wrap=True)
        step = checkpoint["global_step"]
    interrupt = SaveOnInterrupt(settings.checkpoint_folder / LAST)
    trainer = build_trainer(
        settings.trainer,
        callbacks=[ExactResume(), *build_all(settings.callbacks, "callbacks")],
        loggers=build_loggers(settings.logger, step),
        output_dir=settings.paths.output_dir,
        num_batches=len(data.train_dataloader()),
    )
    trainer.callbacks.append(interrupt)  # type: ignore[attr-defined]
    refuse_processes(trainer, module.processor.settings, is_multirun())
    console.quiet = not trainer.is_global_zero
    _introduce(console, settings, module, data, trainer)
    run_folder.mark_unfinished(Path(settings.paths.output_dir))
    try:
        seconds = _fit(trainer, module, data, ckpt_path, interrupt)
        _check_written(trainer, settings)
        return _finish(settings, trainer, module, data, seconds, console)
    except KeyboardInterrupt:
        if not trainer.is_global_zero:
            sys.exit(0)  # for any other code Lightning would kill the first process before it has said all
        where = f" at step {trainer.global_step}" if trainer.global_step else ""  # spawned processes tell nothing
        print(f"\n{signals.name()}{where}\n{_how_to_go_on(interrupt.path, ckpt_path)}", file=sys.stderr)
        sys.exit(signals.exit_code())
    finally:
        console.print(f"run folder: {settings.paths.output_dir}", highlight=False, soft_wrap=True)


def _goes_on_from(settings: TrainSettings) -> str | None:
    """The checkpoint that a run goes on from, if it does."""
    if settings.resume is None:
        return settings.ckpt_path
    found = run_folder.newest_whole(settings.checkpoint_folder)
    return None if found is None else str(found)


def _by_resume(settings: TrainSettings) -> str:
    """What becomes of a run that is repeated with resume=auto."""
    found = run_folder.newest_whole(settings.checkpoint_folder)
    if found is None:
        return "with resume=auto: no checkpoint could be written yet, it begins anew"
    return f"with resume=auto, which finds this run: it goes on from step {checkpoints.load(found)['global_step']}"


def _check_written(trainer: pl.Trainer, settings: TrainSettings) -> None:
    """See that every checkpoint of a run that ends is on the disk.

    Raises:
        CheckpointError: one isn't; the best one on the disk may be another than the best one.
    """
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    failed = trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failed)
    if failed:
        listed = "\n".join(f"  {path}: {reason}" for path, reason in failed.items())
        raise CheckpointError(
            f"training has ended, and checkpoints could not be written:\n{listed}\nMake room and repeat the command "
            f"{_by_resume(settings)}, and then tests"
        )


def _introduce(
    console: Console, settings: TrainSettings, module: EnergyFlowModule, data: EnergyDataModule, trainer: pl.Trainer
) -> None:
    pairs = ", ".join(f"{len(split):,} {name}" for name, split in data.splits().items())
    console.print(
        f"run folder: {settings.paths.output_dir}\n"
        f"{describe(module)}\n"
        f"data {settings.data['name']}: {pairs} pairs of dimension {data.dim}\n"
        f"device {trainer.strategy.root_device}, precision {trainer.precision}, seed {settings.seed}",
        highlight=False,
        soft_wrap=True,
    )


def _fit(
    trainer: pl.Trainer,
    module: EnergyFlowModule,
    data: EnergyDataModule,
    ckpt_path: str | None,
    interrupt: SaveOnInterrupt,
) -> float:
    """Train; returns the seconds it took. A note in an error says how to go on."""
    started = time.perf_counter()
    try:
        with ended_by_signals(trainer):
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    except EnergyFlowError:  # says itself what to do
        raise
    except Exception as error:
        if "returned nan values in its" in str(error):
            raise NotFiniteError(f"{error} The call whose gradient that is stands above. {REMEDY}") from error
        error.add_note(_how_to_go_on(interrupt.path, ckpt_path))
        raise
    return time.perf_counter() - started


def _how_to_go_on(last: Path, ckpt_path: str | None) -> str:
    if last.is_file():
        return f"to go on from step {checkpoints.load(last)['global_step']}:\n{resume_command(last)}"
    if ckpt_path is not None:
        return f"to go on from where this began:\n{resume_command(Path(ckpt_path))}"
    return "there is no checkpoint yet to go on from"


def _finish(
    settings: TrainSettings,
    trainer: pl.Trainer,
    module: EnergyFlowModule,
    data: EnergyDataModule,
    seconds: float,
    console: Console,
) -> float | None:
    """Test the best checkpoint, compare it with the baselines, write and show the results."""
    best_path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    best_score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    score = trainer.callback_metrics.get(settings.optimized_metric) if best_score is None else best_score
    metrics = {"params": float(module.num_parameters), "fit_seconds": seconds}
    if score is not None:
        metrics[settings.optimized_metric] = float(score)
    if settings.test and data.test is not None:
        keep = KeepRowScores(Path(settings.paths.output_dir, FILE), task_of(settings.optimized_metric).row_measure)
        metrics |= run_test(trainer, module, data, best_path or None, [keep])
    else:
        console.print("no test: " + ("data.test is null" if settings.test else "test=false"), highlight=False)
    results = finish(settings, trainer, module, data, metrics, console)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Under names of their own: the curves of the same metrics must not get a point at step 0.
            found = {f"result/{name}": value for name, value in results.summary().items()}
            logger.log_hyperparams(hyper_parameters(settings), found, trainer.global_step)
            logger.finalize("success")  # once more: the line above opened a writer, which is a thread
    console.print(
        f"trained {seconds:.0f} s; TensorBoard: tensorboard --logdir {settings.paths.log_dir}", soft_wrap=True
    )
    return metrics.get(settings.optimized_metric)


def _free() -> None:
    """Jobs of a multirun share one process: leave nothing of this one to the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@application("train")
def main(config: dict[str, Any]) -> float | None:
    """Entry point."""
    filter_warnings(resuming=config.get("ckpt_path") is not None or config.get("resume") is not None)
    try:
        return train(config)
    finally:
        _free()


if __name__ == "__main__":
    main()
