"""The results table of a checkpoint: python -m energy_flow.evaluate ckpt_path=... [key=value ...]"""

from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from energy_flow import cli
from energy_flow.data import EnergyDataModule
from energy_flow.settings import read
from energy_flow.training import checkpoint as checkpoints
from energy_flow.training.building import build_trainer
from energy_flow.training.callbacks.progress_bar import ProgressBar
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.run import EvaluateSettings, check_normalisation, finish, say_whose_data, test
from energy_flow.training.task import task_of


def evaluate(config: dict[str, Any]) -> float:
    """Test a checkpoint beside the baselines; returns the test metric of the name of `optimized_metric`."""
    settings = read(EvaluateSettings, config, "")
    task_of(settings.optimized_metric)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    checkpoint = checkpoints.load(settings.ckpt_path)
    data = EnergyDataModule.from_config(config)
    data.setup("test")
    size = settings.lattice
    checkpoint = checkpoints.on_lattice(checkpoint, size.width, size.height, data.dim, settings.ckpt_path)
    trainer = build_trainer(
        settings.trainer,
        callbacks=[ProgressBar(leave=False)],
        loggers=[],
        output_dir=settings.paths.output_dir,
    )
    console = Console(quiet=not trainer.is_global_zero)
    module = checkpoints.restore(EnergyFlowModule, checkpoint, settings.ckpt_path, settings.rollout)
    check_normalisation((module.run_config or {}).get("data", {}).get("normalize", data.settings.normalize), data)
    say_whose_data(module.fingerprint, data, console)
    metrics = {**test(settings, trainer, module, data, None), "params": float(module.num_parameters)}
    finish(settings, trainer, module, data, metrics, console)
    console.print(f"run folder: {settings.paths.output_dir}", highlight=False, soft_wrap=True)
    return metrics[settings.optimized_metric.replace("val/", "test/")]


@cli.application("evaluate")
def main(config: dict[str, Any]) -> float:
    """Entry point."""
    cli.quieten()
    return evaluate(config)


if __name__ == "__main__":
    main()
