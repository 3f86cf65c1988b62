"""Train a flow lattice: python -m energy_flow.train [key=value ...]"""

import gc
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from energy_flow import signals, targets
from energy_flow.checkpoints.exact_resume import ExactResume
from energy_flow.checkpoints.interrupt import SaveOnInterrupt
from energy_flow.checkpoints.io import LAST, AtomicCheckpointIO
from energy_flow.data import OwnData, RunData, build_data
from energy_flow.errors import ConfigError
from energy_flow.metrics.row_scores import FILE
from energy_flow.runs import folder as run_folder
from energy_flow.runs import resume
from energy_flow.runs.application import application
from energy_flow.runs.checks import check_candidates, check_loss, refuse_processes
from energy_flow.runs.instantiate import build_callbacks, build_loggers
from energy_flow.runs.job import hydra_quoted, is_multirun
from energy_flow.runs.log import filter_warnings
from energy_flow.runs.monitors import CheckMetrics, check_monitors
from energy_flow.runs.results import finish, read_metrics, run_test
from energy_flow.runs.settings import TrainSettings
from energy_flow.runs.trainer import build_trainer, check_epoch
from energy_flow.runs.training import fit, introduce, log_results
from energy_flow.settings import read
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from energy_flow.training.module import EnergyFlowModule


def train(config: dict[str, Any]) -> float | None:
    """Run one experiment, from its config to its results.

    Returns:
        The best value of `optimized_metric`; None for a run without a checkpoint callback.
    """
    settings = read(TrainSettings, config, "")
    _ = settings.task  # refuses an unknown metric
    folder = Path(settings.paths.output_dir)
    if settings.resume == "auto" and is_multirun():
        raise ConfigError(
            "resume = auto: resumes single runs only. Resume the jobs of a multirun one by one, with ckpt_path"
        )
    if settings.resume == "auto" and run_folder.is_finished(folder):
        last = shlex.quote(f"ckpt_path={hydra_quoted(str(settings.checkpoint_folder / LAST))}")
        print(
            f"run folder: {folder}\nfinished already, there is nothing to resume. To train longer, give {last} and a "
            "higher trainer.max_epochs, without resume"
        )
        return read_metrics(folder).get(settings.optimized_metric)
    with run_folder.locked(folder), resume.unwritable_explained(settings):
        value = _train(config, settings)
        run_folder.mark_finished(folder)
    return value


def _train(config: dict[str, Any], settings: TrainSettings) -> float | None:
    """Data, model, callbacks, loggers, trainer; then fit, and test."""
    console = Console()
    pl.seed_everything(settings.seed, workers=True, verbose=False)

    with targets.from_user():
        data = build_data(config)
    data.setup("fit")

    with targets.from_user():
        module = EnergyFlowModule.from_config(config, data.dim)
    module.run_config = config
    check_loss(settings.optimized_metric, module.loss)
    check_candidates(module.loss, data)

    resumed = resume.find_checkpoint(settings)
    if resumed is not None:
        resume.check_resume(resumed, module, data, console)

    with targets.from_user():
        callbacks = [ExactResume(), CheckMetrics(settings.optimized_metric), *build_callbacks(settings.callbacks)]
        loggers = build_loggers(settings.logger, resume.purge_step(settings, resumed))
    interrupt = SaveOnInterrupt(settings.checkpoint_folder / LAST)

    trainer = build_trainer(
        settings.trainer,
        callbacks=callbacks,
        loggers=loggers,
        output_dir=settings.paths.output_dir,
        checkpoint_io=AtomicCheckpointIO(resumed),
    )
    check_epoch(trainer, data.num_batches())
    check_monitors(trainer, settings.optimized_metric, module.loss.term_weights())
    trainer.callbacks.append(interrupt)  # type: ignore[attr-defined]  # it must be the last one
    refuse_processes(trainer, module.processor.settings, is_multirun())

    console.quiet = not trainer.is_global_zero
    introduce(console, settings, module, data, trainer)
    run_folder.mark_unfinished(Path(settings.paths.output_dir))
    try:
        started = time.perf_counter()
        fit(trainer, module, data, resumed, interrupt.path)
        seconds = time.perf_counter() - started
        resume.check_written(trainer, settings)
        return _test(settings, trainer, module, data, seconds, console)
    except KeyboardInterrupt:
        if not trainer.is_global_zero:
            sys.exit(0)  # after any other code Lightning kills the first process before it has printed everything
        where = f" at step {trainer.global_step}" if trainer.global_step else ""  # spawned processes report no step
        print(f"\n{signals.name()}{where}\n{resume.how_to_resume(interrupt.path, resumed)}", file=sys.stderr)
        sys.exit(signals.exit_code())
    finally:
        console.print(f"run folder: {settings.paths.output_dir}", highlight=False, soft_wrap=True)


def _test(
    settings: TrainSettings,
    trainer: pl.Trainer,
    module: EnergyFlowModule,
    data: RunData,
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
    if settings.test and data.has_test:
        path = Path(settings.paths.output_dir, FILE)
        keep = [] if isinstance(data, OwnData) else [KeepRowScores(path, settings.task.row_measure)]
        metrics |= run_test(trainer, module, data, best_path or None, keep)
    else:
        missing = "data._target_ has no test_dataloader" if isinstance(data, OwnData) else "data.test is null"
        console.print("no test: " + (missing if settings.test else "test=false"), highlight=False)
    finish(settings, trainer, module, data, metrics, console)
    log_results(trainer, settings, metrics)
    console.print(
        f"trained {seconds:.0f} s; TensorBoard: tensorboard --logdir {settings.paths.log_dir}", soft_wrap=True
    )
    return metrics.get(settings.optimized_metric)


@application("train")
def main(config: dict[str, Any]) -> float | None:
    """Entry point."""
    filter_warnings(resuming=config.get("ckpt_path") is not None or config.get("resume") is not None)
    try:
        return train(config)
    finally:
        gc.collect()  # the jobs of a multirun share one process
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
