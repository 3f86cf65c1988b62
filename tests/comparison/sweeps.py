"""Write folders of multiruns without running the jobs."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from energy_flow.metrics.bootstrap import Bootstrap, Interval
from energy_flow.metrics.row_scores import FILE, RowScores, write_row_scores

NUM_ROWS = 200


def ranks_about(middle: float, seed: int) -> Tensor:
    """Ranks of `NUM_ROWS` rows, mostly below `middle`. The same rows are hard for all seeds."""
    hard = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 1 + (middle * hard * (0.8 + 0.4 * own)).floor()


def write_job(
    folder: Path,
    number: int,
    words: str,
    values: dict[str, Tensor] | None,
    *,
    measure: str = "rank",
    fingerprint: str = "data",
) -> Path:
    """Write a job's folder with the row scores `values`. None: the job failed."""
    run = folder / str(number)
    (run / ".hydra").mkdir(parents=True)
    given = words.split()
    seed = next((int(word.split("=")[1]) for word in given if word.startswith("seed=")), 1)
    OmegaConf.save(OmegaConf.create(given), run / ".hydra" / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"seed": seed, "name": "${missing}"}), run / ".hydra" / "config.yaml")
    if values is None:
        return run
    primary = {"rank": "mrr", "mse": "mse"}[measure]
    metrics = {"params": 1000.0 + number, "fit_seconds": 2.0 + seed, f"val/{primary}": 0.5, "test/cosine": 0.1}
    for method, rows in values.items():
        prefix = "test" if method == "model" else f"baseline/{method}"
        found = (
            {"mse": rows.mean()}
            if measure == "mse"
            else {"mrr": (1 / rows).mean(), "recall@1": (rows <= 1).double().mean()}
        )
        metrics |= {f"{prefix}/{name}": value.item() for name, value in found.items()}
    (run / "metrics.json").write_text(json.dumps(metrics))
    write_row_scores(run / FILE, RowScores(measure, fingerprint, values))
    return run


def paired_difference(ours: Tensor, theirs: Tensor) -> Interval:
    """mean(ours) - mean(theirs) on the same test rows, with its interval."""
    return Bootstrap({"ours": ours, "theirs": theirs}).difference("ours", "theirs")
