"""The good files that a campaign damages; all are small."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import save as save_torch

from energy_flow.checkpoints import format as checkpoints
from energy_flow.config import compose
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.training.module import EnergyFlowModule

N, D = 6, 4


@dataclass(frozen=True)
class Seed:
    """A good file: name and content."""

    name: str
    content: bytes


def data_seeds() -> list[Seed]:
    """Return a file of every format of embeddings, of their names and of text pairs."""
    random = np.random.default_rng(0)
    floats: dict[str, Any] = {side: random.normal(size=(N, D)).astype(np.float32) for side in ("source", "target")}
    small = {side: np.rint(rows * 30).astype(np.int8) for side, rows in floats.items()}
    small |= {f"{side}_scale": np.full(N, 0.03, np.float32) for side in floats}
    halves = {side: torch.from_numpy(rows).bfloat16() for side, rows in floats.items()}
    lines = [{"source": f"source, {row}", "target": f"wört {row}"} for row in range(N)]
    table = "".join(f'"{line["source"]}",{line["target"]}\n' for line in lines)
    return [
        Seed("pairs.safetensors", save_numpy(floats)),
        Seed("pairs.safetensors", save_numpy(small, {"encoder": "x"})),
        Seed("pairs.safetensors", save_torch(halves)),
        Seed("pairs.npz", _written(np.savez, **floats)),
        Seed("pairs.npz", _written(np.savez_compressed, **small)),
        Seed("pairs.npy", _written(np.save, arr=floats["source"])),
        Seed("pairs.npy", _written(np.save, arr=np.asfortranarray(floats["source"].astype(np.float64)))),
        Seed("pairs.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()),
        Seed("texts.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()),
        Seed("texts.csv", f"source,target\n{table}".encode()),
    ]


def model_seeds(folder: Path) -> list[Seed]:
    """Write a training checkpoint (made without a run) and a pretrained model into `folder`, and return both."""
    config = compose("lattice.width=3", "lattice.height=3", "model.hidden_size=4", "model.features=4")
    module = EnergyFlowModule.from_config(config, D)
    contents = {
        "pytorch-lightning_version": "2.6.0",
        "epoch": 1,
        "global_step": 2,
        checkpoints.KEY: checkpoints.provenance(config, D, {"train": "0a"}),
        "hyper_parameters": dict(module.hparams),
        "state_dict": dict(module.state_dict()),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 2}],
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "/run/best.ckpt", "dirpath": "/run"}},
    }
    torch.save(contents, folder / "model.ckpt")
    model = EnergyFlowModel.from_checkpoint(folder / "model.ckpt")
    model.save_pretrained(folder / "model.safetensors")
    return [Seed(name, (folder / name).read_bytes()) for name in ("model.ckpt", "model.safetensors")]


def _written(write: Any, **arrays: Any) -> bytes:
    file = io.BytesIO()
    write(file, **arrays)
    return file.getvalue()
