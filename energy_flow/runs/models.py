"""Load trained models, to test one or several of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.comparison.baselines import NEEDS
from energy_flow.comparison.compare import MEAN
from energy_flow.data import EnergyDataModule
from energy_flow.errors import ConfigError
from energy_flow.metrics.row_scores import MODEL
from energy_flow.pretrained.card import read_model
from energy_flow.runs.checks import check_normalisation
from energy_flow.training.losses import LossSettings
from energy_flow.training.module import EnergyFlowModule


@dataclass(frozen=True)
class Model:
    """A model to test."""

    key: str  # `model` for a single model, otherwise a short name
    path: str  # as given in the config
    module: EnergyFlowModule
    loss: LossSettings  # trains the baselines that are compared with this model


def model_keys(paths: Sequence[str]) -> list[str]:
    """Keys of the models in files; a ConfigError if a file is given twice."""
    files = [Path(path).expanduser().absolute() for path in paths]
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise ConfigError(f"ckpt_path = {paths[number]}: given twice; leave one out")
    return [MODEL] if len(files) == 1 else short_names(files, {MODEL, MEAN, *NEEDS})


def short_names(paths: Sequence[Path], taken: set[str]) -> list[str]:
    """Shortest path suffixes that distinguish the files.

    `checkpoints` folders and file suffixes are left out where possible, and a file name that all files share. A file
    whose folders don't distinguish it, or whose name is taken, gets its number as its name.
    """
    full = [(*path.parent.parts, path.name) for path in paths]
    short = [(*(part for part in path.parent.parts if part != "checkpoints"), path.stem) for path in paths]
    parts = short if len(set(short)) == len(paths) else full
    if len(parts) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    endings = [["-".join(own[-length:]) for length in range(1, len(own))] for own in parts]
    counts = Counter(name for names in endings for name in names)
    return [
        next((name for name in names if counts[name] == 1 and name not in taken), str(number))
        for number, names in enumerate(endings, 1)
    ]


def load_checkpoint(path: str, loss: LossSettings) -> dict[str, Any]:
    """Read a training checkpoint, or a file of `save_pretrained` in the same form.

    The optimiser's settings are left out: evaluation doesn't need them, and an old checkpoint may lack a newer key. A
    .safetensors file has no loss: it gets `loss` with a fixed temperature, and without terms of one's own.

    Raises:
        CheckpointError: the file is missing or unusable.
    """
    if not _is_pretrained(path):
        checkpoint = checkpoints.load(path)
        return {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], "optimizer": None}}
    card, weights = read_model(Path(path).expanduser())
    described = {
        "dim": card.dim,
        "lattice": card.lattice.model_dump(),
        "model": card.model.model_dump(),
        "loss": {**loss.model_dump(), "learn_temperature": False, "terms": None},
        "optimizer": None,
        "seed": card.seed,
    }
    config = {"data": {"normalize": card.normalize}}
    return {
        "hyper_parameters": described,
        "state_dict": {f"processor.{name}": value for name, value in weights.items()},
        checkpoints.KEY: checkpoints.provenance(config, card.dim, card.data_fingerprint),
    }


def restore_model(
    key: str,
    path: str,
    checkpoint: dict[str, Any],
    data: EnergyDataModule,
    *,
    width: int | None,
    height: int | None,
    rollout: dict[str, Any],
    loss: LossSettings,
) -> Model:
    """Build the model of `load_checkpoint` on a lattice of `width` and `height` cells; None: as in the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not match the data or this version.
        ConfigError: the data are normalised in another way than in training.
    """
    checkpoint = compatibility.on_lattice(checkpoint, width, height, data.dim, path)
    module = compatibility.restore(EnergyFlowModule, checkpoint, path, rollout)
    trained_on = (module.run_config or {}).get("data", {})
    check_normalisation(trained_on.get("normalize", data.settings.normalize), data, f"ckpt_path = {path}: the model")
    return Model(key, path, module, loss if _is_pretrained(path) else module.loss)


def _is_pretrained(path: str) -> bool:
    return Path(path).suffix == ".safetensors"
