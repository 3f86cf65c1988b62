"""Find the configs, and compose them without the command line."""

from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from energy_flow.metrics.task import direction

# For conf/callbacks: a callback that monitors a metric must know whether less or more is better.
OmegaConf.register_new_resolver("direction", direction, replace=True)

SECTIONS = ("seed", "lattice", "model", "data", "loss", "optimizer", "rollout", "trainer")


def config_dir() -> str:
    """The folder of the configs: inside the package if installed, next to it in a checkout."""
    package = Path(__file__).parent
    packaged = package / "conf"
    return str(packaged if packaged.is_dir() else package.parent / "conf")


def compose(*overrides: str) -> dict[str, Any]:
    """Compose the training config as plain containers, for use from Python.

    Args:
        overrides: as on the command line, e.g. "size=debug", "lattice.depth=12".

    Returns:
        The sections of model, data and training: `seed`, `lattice`, `model`, `data`, `loss`, `optimizer`, `rollout`,
        `trainer`. Callbacks, loggers and paths belong to the command line.
    """
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = hydra_compose("train", overrides=list(overrides))
    plain: dict[str, Any] = {}
    for section in SECTIONS:
        value = config[section]
        plain[section] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return plain
