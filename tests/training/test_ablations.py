"""Each ablation changes only its own settings, and overrides an experiment."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from energy_flow.config import compose, config_dir
from energy_flow.training.module import EnergyFlowModule

NAMES = sorted(path.stem for path in Path(config_dir(), "ablation").glob("*.yaml"))
CHANGES = {
    "full": {},
    "no_flows": {"lattice.max_steps": 0},
    "no_movement": {"lattice.movement.scale": 0.0},
    "frozen_carrier": {"optimizer.freeze": ["carrier"]},
    "nearest": {"lattice.deposit": "nearest"},
    "energy_dim_1": {"model.energy_dim": 1},
    "energy_dim_8": {"model.energy_dim": 8},
    "steps_2": {"lattice.max_steps": 2},
    "steps_8": {"lattice.max_steps": 8},
    "spawn": {"lattice.spawn.enabled": True},
    "lattice_10": {"lattice.width": 10, "lattice.height": 10},
    "lattice_20": {"lattice.width": 20, "lattice.height": 20},
    "no_skip": {"model.skip": False},
}


def flat(section: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(section, dict):
        return {key: section}
    return {k: v for name, value in section.items() for k, v in flat(value, f"{key}.{name}" if key else name).items()}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return hydra_compose("train", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("name", NAMES)
def test_an_ablation_changes_only_its_settings(name: str) -> None:
    before, after = (flat(compose("experiment=ablation", *more)) for more in ((), (f"ablation={name}",)))
    assert {key: after[key] for key in after if after[key] != before[key]} == CHANGES[name]
    if name != "full":
        EnergyFlowModule.from_config(compose(f"ablation={name}"), 12)


def test_an_ablation_overrides_an_experiment() -> None:
    transport = compose("experiment=transport", "ablation=no_movement")
    assert transport["lattice"]["movement"]["scale"] == 0.0
    assert transport["data"]["name"] == "transport"
    assert compose("experiment=transport", "ablation=steps_8")["lattice"]["max_steps"] == 8


@pytest.mark.parametrize(
    ("experiment", "names", "seeds"),
    [
        ("ablation", set(CHANGES), {"1", "2", "3"}),
        (
            "ablation_small",
            {"full", "no_flows", "no_movement", "frozen_carrier", "nearest", "energy_dim_1"},
            {"1", "2"},
        ),
    ],
)
def test_the_jobs_of_the_experiment(experiment: str, names: set[str], seeds: set[str]) -> None:
    config = composed(f"experiment={experiment}")
    params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    [jobs] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    pairs = [tuple(word.split("=")[1].strip() for word in job) for job in jobs]
    assert pairs[0] == ("1", "full"), "what the others are compared with comes first"
    assert set(pairs) == {(seed, name) for seed in seeds for name in names}
    assert len(pairs) == len(set(pairs))
    assert not config.baselines.enabled
    assert config.callbacks.flow_monitor is None
