"""The results table of a checkpoint: python -m energy_flow.evaluate ckpt_path=... [key=value ...]"""

from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from energy_flow import cli
from energy_flow.data import EnergyDataModule
from energy_flow.errors import CheckpointError
from energy_flow.settings import read
from energy_flow.training import checkpoint as checkpoints
from energy_flow.training.building import build_trainer
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.run import (
    EvaluateSettings,
    Results,
    fit_baselines,
    scalars,
    show_results,
    write_metrics,
)


def evaluate(config: dict[str, Any]) -> float:
    """Test a checkpoint beside the baselines; returns its MRR."""
    settings = read(EvaluateSettings, config, "")
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    checkpoint = checkpoints.load(settings.ckpt_path)
    data = EnergyDataModule.from_config(config)
    data.setup("test")
    dim = checkpoint[checkpoints.KEY]["embedding_dim"]
    if data.dim != dim:
        raise CheckpointError(
            f"ckpt_path = {settings.ckpt_path}: takes embeddings of dimension {dim}, the data have {data.dim}. "
            "Give data made with the same encoder as the training data"
        )
    trainer = build_trainer(
        settings.trainer,
        callbacks=[pl.callbacks.TQDMProgressBar(leave=False)],
        loggers=[],
        output_dir=settings.paths.output_dir,
    )
    console = Console(quiet=not trainer.is_global_zero)
    module = EnergyFlowModule.load_from_checkpoint(settings.ckpt_path, map_location="cpu")
    trainer.test(module, datamodule=data, verbose=False)
    baselines = fit_baselines(settings, data, module, trainer.strategy.root_device, console)
    results = Results({**scalars(trainer.callback_metrics), "params": float(module.num_parameters)}, baselines)
    if trainer.is_global_zero:
        _say_whose_data(console, module, data)
        show_results(results, "flow lattice", console)
        console.print(f"written to {write_metrics(results, settings.paths.output_dir)}", soft_wrap=True)
    return results.metrics["test/mrr"]


def _say_whose_data(console: Console, module: EnergyFlowModule, data: EnergyDataModule) -> None:
    trained_on = module.fingerprint
    differing = [split for split in data.fingerprint if data.fingerprint[split] != trained_on.get(split)]
    if differing:
        console.print(f"the checkpoint was not trained with these data: {', '.join(differing)} differ")


@cli.application("evaluate")
def main(config: dict[str, Any]) -> float:
    """Entry point."""
    cli.quieten()
    return evaluate(config)


if __name__ == "__main__":
    main()
