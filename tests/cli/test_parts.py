"""Parts from the config: every group on the command line, in sweeps and experiments, evaluated and resumed."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from energy_flow import targets
from tests.cli.helpers import Program

CARRIERS = "energy_flow.core.carriers"
# A carrier of a user's own package; it keeps the whole protocol in a few lines.
OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, features, energy_dim, scale=1.0):
        super().__init__()
        self.scale = scale
        self.head = nn.Linear(features + energy_dim, energy_dim + 3)

    def forward(self, features, energy, hidden):
        return self.scale * self.head(torch.cat([features, energy], -1)), ()
"""


def checkpoint(folder: Path, name: str = "best") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


class Stop(Callback):
    """End a run as Ctrl-C does, before the second epoch."""

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("overrides", "key", "target"),
    [
        (("model/neuron=local_field",), "neuron", "energy_flow.core.local_field.LocalFieldNeuron"),
        (("model/carrier=lstm",), "carrier", f"{CARRIERS}.LSTMCarrier"),
        (("model/map_in=mlp", "model/map_out=mlp"), "map_in", "energy_flow.core.embedding_mapper.MapIn"),
        (("model/map_out=conv", "model/map_in=conv"), "map_out", "energy_flow.core.maps.ConvMapOut"),
        (("lattice/aggregation=sum",), "aggregation", "energy_flow.core.aggregation.SumAggregation"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_group(program: Program, overrides: tuple[str, ...], key: str, target: str) -> None:
    """Shipped classes need no trust: the checkpoint is evaluated, and used for a prediction."""
    program.patch.delenv(targets.TRUST, raising=False)
    trained = program.train(*overrides)
    assert (trained.code, trained.err) == (0, "")
    saved = checkpoint(trained.folder)["hyper_parameters"]
    assert saved["lattice" if key == "aggregation" else "model"][key]["_target_"] == target
    best = f"ckpt_path={trained.folder}/checkpoints/best.ckpt"
    evaluated = program.evaluate(best)
    assert (evaluated.code, evaluated.err) == (0, "")
    assert evaluated.metrics()["test/mrr"] == pytest.approx(trained.metrics()["test/mrr"])
    predicted = program.predict(best, "row=0")
    assert (predicted.code, predicted.err) == (0, "")


def test_sizes_of_a_preset_reach_an_option(program: Program) -> None:
    small = ("lattice.width=4", "lattice.height=4", "lattice.depth=2", "model.num_layers=1", "data.batch_size=16")
    outcome = program.train("size=debug", "debug=limit", "model.hidden_size=24", "model/carrier=lstm", *small)
    assert outcome.code == 0, outcome.err
    saved = checkpoint(outcome.folder, "last")["hyper_parameters"]["model"]
    assert saved["carrier"] == {"_target_": f"{CARRIERS}.LSTMCarrier", "hidden_size": 24, "num_layers": 1}


def test_an_experiment_chooses_an_option(program: Program) -> None:
    folder = program.folder / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model/carrier: lstm\nmodel:\n  carrier:\n    hidden_size: 5\n"
    )
    outcome = program.train("experiment=own", f"hydra.searchpath=[{program.folder / 'mine'}]")
    assert (outcome.code, outcome.err) == (0, "")
    saved = checkpoint(outcome.folder)["hyper_parameters"]["model"]["carrier"]
    assert (saved["_target_"], saved["hidden_size"]) == (f"{CARRIERS}.LSTMCarrier", 5)


def test_a_sweep(program: Program) -> None:
    outcome = program.train("model/carrier=gru,lstm", multirun=True)
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = (program.folder / "logs" / "train" / "multiruns").iterdir()
    names = [checkpoint(folder / job)["hyper_parameters"]["model"]["carrier"]["_target_"] for job in ("0", "1")]
    assert names == ["energy_flow.core.energy_carrier.EnergyCarrier", f"{CARRIERS}.LSTMCarrier"]
    assert "model/carrier=lstm" in (folder / "summary.md").read_text()


@pytest.fixture
def own(program: Program) -> tuple[str, ...]:
    """Overrides for a carrier of a user's own package and config folder."""
    name = f"package_of_{program.folder.name}"  # Python keeps imported modules
    program.patch.syspath_prepend(program.folder)
    program.patch.delenv(targets.TRUST, raising=False)
    (program.folder / f"{name}.py").write_text(OWN)
    folder = program.folder / "my_conf" / "model" / "carrier"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text(f"# Mine.\n_target_: {name}.Own\nscale: 0.5   # Factor\n")
    return ("model/carrier=own", f"hydra.searchpath=[{program.folder / 'my_conf'}]")


def test_a_class_of_ones_own(program: Program, own: tuple[str, ...]) -> None:
    """Training and resuming need no environment variable; loading the checkpoint's model does."""
    overrides = (*own, "trainer.max_epochs=2")
    stopped = program.train(*overrides, more_callbacks=[Stop()])
    assert stopped.code == 130
    printed = shlex.split(stopped.err.strip().splitlines()[-1])
    assert own[1] in printed
    resumed = program.train(*overrides, "resume=auto")
    assert (resumed.code, resumed.err) == (0, "")
    assert "resuming from step 4" in resumed.out
    best = f"ckpt_path={resumed.folder}/checkpoints/best.ckpt"
    assert "ENERGY_FLOW_TRUST=my_package" in program.refused(best, program="evaluate")
    program.patch.setenv(targets.TRUST, f"package_of_{program.folder.name}")
    evaluated = program.evaluate(best)
    assert (evaluated.code, evaluated.err) == (0, "")
    assert evaluated.metrics()["test/mrr"] == pytest.approx(resumed.metrics()["test/mrr"])


def test_another_option_is_another_architecture(program: Program) -> None:
    folder = program.train("model/carrier=lstm").folder
    last = f"ckpt_path={folder}/checkpoints/last.ckpt"
    message = program.refused(last, "model/carrier=lstm", "model.carrier.hidden_size=9")
    assert "model.carrier.hidden_size: 8 in the checkpoint, 9 here" in message
    message = program.refused(last, "model/carrier=lstm", "lattice/aggregation=sum")
    assert "lattice.aggregation._target_: None in the checkpoint" in message


@pytest.mark.parametrize("maps", [("model.maps=identity",), ("model/map_in=identity", "model/map_out=identity")])
def test_identity_maps_run_on_another_lattice(program: Program, maps: tuple[str, ...]) -> None:
    same = ("model.energy_dim=1", "model/neuron=local_field", *maps)
    best = f"ckpt_path={program.train(*same).folder}/checkpoints/best.ckpt"
    outcome = program.evaluate(best, "lattice.width=8", "lattice.height=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "flow lattice 8 x 2 x 8" in outcome.out


@pytest.mark.parametrize("maps", [("model/map_in=linear", "model/map_out=linear"), ("model/map_in=identity",)])
def test_other_maps_belong_to_their_cells(program: Program, maps: tuple[str, ...]) -> None:
    best = f"ckpt_path={program.train('model.energy_dim=1', *maps).folder}/checkpoints/best.ckpt"
    message = program.refused(best, "lattice.width=8", "lattice.height=2", program="evaluate")
    assert "learned maps, which belong to their cells" in message
