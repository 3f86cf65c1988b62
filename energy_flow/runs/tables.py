"""Tables and notes about models, baselines and examples, for the screen."""

import math
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.nn import functional

from energy_flow.comparison.baselines import BaselineResults
from energy_flow.data import EnergyDataModule
from energy_flow.metrics.task import Task
from energy_flow.training.module import EnergyFlowModule

EXAMPLES = 5


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
