"""The documented tags of TensorBoard, from one short run of the real module with all callbacks."""

from itertools import combinations
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from energy_flow.training.callbacks.flow_monitor import FlowMonitor
from energy_flow.training.callbacks.memory_cleanup import MemoryCleanup
from energy_flow.training.callbacks.memory_monitor import MemoryMonitor
from energy_flow.training.callbacks.phase_times import PhaseTimes
from tests.training.runs import events
from tests.training.test_module import make_loader, make_module, make_trainer


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    folder: Path = tmp_path_factory.mktemp("tensorboard")
    logger = TensorBoardLogger(folder, name="", version="")
    callbacks = [FlowMonitor(1, samples=1, max_flows=5), MemoryCleanup(1, 0.5), MemoryMonitor(), PhaseTimes()]
    trainer = make_trainer(*callbacks, logger=logger, log_every_n_steps=2)
    trainer.fit(make_module(), make_loader(32), make_loader(16))
    found = events(folder).Tags()
    return {kind: set(found[kind]) for kind in ("scalars", "histograms", "images")}


@pytest.mark.parametrize(
    ("kind", "promised"),
    [
        ("scalars", ["train/loss", "train/contrastive", "val/loss", "val/mrr", "val/median_rank", "val/cosine"]),
        ("scalars", [f"flows/{name}" for name in ("share_z0", "share_projected", "steps", "spawned", "overflow")]),
        ("scalars", [f"flows/{name}" for name in ("coverage", "displacement", "energy_mean", "energy_std")]),
        ("scalars", [f"time/{name}" for name in ("place", "propagate", "collect", "aggregate", "backward", "cleanup")]),
        ("scalars", ["memory/host_rss", "cleanup/removed_bytes"]),
        ("histograms", [f"flow_values/{name}" for name in ("x", "y", "z", "displacement", "energy")]),
        ("images", ["surfaces/input", "surfaces/output", "landings/0", "groups/0", "trajectories/0", "population"]),
    ],
)
def test_every_documented_tag_is_there(tags: dict[str, set[str]], kind: str, promised: list[str]) -> None:
    assert set(promised) <= tags[kind]


def test_every_tag_has_one_kind(tags: dict[str, set[str]]) -> None:
    """For a tag with two kinds, TensorBoard would show only the first."""
    for one, other in combinations(tags.values(), 2):
        assert not one & other
