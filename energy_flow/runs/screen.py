"""Print models, metrics, notes about baselines, and examples."""

from collections.abc import Mapping
from math import nan

import torch
from rich.console import Console
from torch.nn import functional

from energy_flow.comparison.baselines import BaselineResults
from energy_flow.data import RunData
from energy_flow.metrics.task import Task
from energy_flow.tables import print_text, rich_table
from energy_flow.training.module import EnergyFlowModule

EXAMPLES = 5


def describe(module: EnergyFlowModule) -> str:
    """Describe a model in one line."""
    lattice, model = module.processor.settings, module.processor.model
    frozen = f", {module.num_frozen:,} of them frozen" if module.num_frozen else ""
    gru = f"GRU {model.num_layers} x {model.hidden_size}"
    carrier = gru if model.carrier is None else f"carrier {type(module.processor.carrier).__name__}"
    return (
        f"flow lattice {lattice.width} x {lattice.height} x {lattice.depth}, energy dimension {model.energy_dim}, "
        f"{lattice.num_steps} step{'s' * (lattice.num_steps != 1)}, {carrier}: "
        f"{module.num_parameters:,} parameters{frozen}"
    )


def show_metrics(task: Task, title: str, methods: Mapping[str, Mapping[str, float | None]], console: Console) -> None:
    """Print a table of metrics by method, the best method in bold; columns without values are left out."""
    metrics = [metric for metric in task.headings if any(metric in row for row in methods.values())]
    primary = [nan if (value := row.get(task.primary)) is None else value for row in methods.values()]
    best = primary[task.best(primary)]
    rows = [
        [name, *("-" if (value := row.get(metric)) is None else task.shown(metric, value) for metric in metrics)]
        for name, row in methods.items()
    ]
    headings = ["method", *(task.headings[metric] for metric in metrics)]
    styles = ["bold" if value == best else "" for value in primary]
    console.print(rich_table(headings, rows, title=title, left=["method"], styles=styles))


def show_notes(baselines: BaselineResults, console: Console) -> None:
    """Print why baselines were left out, and the hyperparameters that the others selected."""
    for name, reason in baselines.skipped.items():
        console.print(f"{name}: left out, {reason}")
    for name, detail in baselines.details.items():
        console.print(f"{name}: {detail}", style="dim", highlight=False, soft_wrap=True)


def show_examples(module: EnergyFlowModule, data: RunData, console: Console) -> None:
    """Print the nearest targets of the first test rows by name, if the rows have names."""
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
        print_text(console, f"  {dataset.names[row]}: {names}")
